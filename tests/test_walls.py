"""The package's rooms: who may import whom, and how large anything may become."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "vllm_kvcompress"
KERNELS = REPO / "kernels" / "kvcompress_kernels"
MAX_LINES = 400

BELOW: dict[str, set[str]] = {
    "kernels": set(),
    "methods": {"kernels"},
    "paging": {"kernels"},
    "planning": {"kernels", "methods", "paging"},
    "eviction": {"kernels", "methods", "paging", "planning"},
    "engine": {"kernels", "methods", "paging", "planning", "eviction"},
    "tools": {"kernels", "methods", "paging", "planning", "eviction", "engine"},
}
"""Rooms that a room may import beside itself."""

IMPORTED_BY_VLLM = {PACKAGE / "tools" / "evaluation" / "forced_tokens.py"}
"""Modules outside `engine` that only a running engine imports, by their names."""

SOURCES = [*sorted(KERNELS.rglob("*.py")), *sorted(PACKAGE.rglob("*.py"))]


def room(path: Path) -> str:
    """Room of a source file; that of the package's own ``__init__`` is empty."""
    if KERNELS in path.parents:
        return "kernels"
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else ""


def room_of_module(module: str) -> str | None:
    """Room of a module by its dotted name; None if it is not ours."""
    parts = module.split(".")
    if parts[0] == "kvcompress_kernels":
        return "kernels"
    if parts[0] != PACKAGE.name:
        return None
    return parts[1] if len(parts) > 1 else ""


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of the modules that import statements among some nodes name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            if module == PACKAGE.name:  # from vllm_kvcompress import a room
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, nothing for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (n for part in node.orelse for n in ast.walk(part))
            continue
        yield node
        yield from run_at_import(node)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """Every source file, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_there_are_six_rooms() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders == set(BELOW) - {"kernels"}


def test_imports_go_one_way(trees: dict[Path, ast.Module]) -> None:
    """Also inside functions and for type checkers: an arrow back is one, wherever it stands."""
    back = set()
    for path, tree in trees.items():
        own = room(path)
        for module in imported(ast.walk(tree)):
            other = room_of_module(module)
            if own and other and other in BELOW and other not in BELOW[own] | {own}:
                back.add(f"{path.relative_to(REPO)}: {module}")
    assert sorted(back) == []


def test_no_modules_import_each_other_in_a_circle(trees: dict[Path, ast.Module]) -> None:
    """Not for type checkers either; an ``__init__`` only hands names on."""
    graph = {}
    for path, tree in trees.items():
        inside = path.relative_to(KERNELS.parent if KERNELS in path.parents else REPO)
        graph[".".join(inside.with_suffix("").parts)] = set(imported(ast.walk(tree)))
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_only_the_engine_imports_vllm_with_the_module(trees: dict[Path, ast.Module]) -> None:
    found = set()
    for path, tree in trees.items():
        if room(path) == "engine" or path in IMPORTED_BY_VLLM:
            continue
        # Below the engine not even inside a function.
        nodes = run_at_import(tree) if room(path) in ("tools", "") else ast.walk(tree)
        for module in imported(nodes):
            if module.partition(".")[0] == "vllm":
                found.add(f"{path.relative_to(REPO)}: {module}")
    assert sorted(found) == []


def test_no_class_name_stands_twice(trees: dict[Path, ast.Module]) -> None:
    places = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(REPO)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_file_is_too_long() -> None:
    files = [*SOURCES, *(REPO / "tests").rglob("*.py"), *(REPO / "scripts").rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {str(path.relative_to(REPO)): n for path, n in lines.items() if n > MAX_LINES}
    assert long == {}

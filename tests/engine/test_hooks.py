"""The installed vLLM is what hook_table.py says, and the table is complete. Runs first of all."""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress import engine
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.hook_table import HOOKS
from vllm_kvcompress.engine.hooks import Use, differences, parameter_names, wrap_once
from vllm_kvcompress.engine.worker import arena_worker
from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker
from vllm_kvcompress.engine.worker_hook_table import WORKER_HOOKS

TABLE = {**HOOKS, **WORKER_HOOKS}
SCHEDULER = "vllm.v1.core.sched.scheduler"
GPU_WORKER = "vllm.v1.worker.gpu_worker"
FILES = [
    path
    for path in Path(engine.__file__).parent.rglob("*.py")
    if path.name not in ("hook_table.py", "worker_hook_table.py", "hooks.py")
]
TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]


# --- the installed vLLM --------------------------------------------------------------------------


@pytest.mark.parametrize("module", TABLE)
def test_the_installed_vllm_is_what_the_table_says(module: str) -> None:
    if module in WORKER_HOOKS:  # some exist in builds for other devices only
        pytest.importorskip(module, exc_type=ImportError)
    assert list(differences({module: TABLE[module]})) == []


def test_the_check_at_start_passes() -> None:
    checks.check_version()


# --- a vLLM that differs -------------------------------------------------------------------------


def refusal() -> str:
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_version()
    return str(caught.value)


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM 0.33, where the names alone are as before."""

    def hit(self: Any, request: Any, max_cache_hit_length: int | None = None) -> None: ...

    monkeypatch.setattr(f"{SCHEDULER}.Scheduler._get_local_prefix_cache_hit", hit)
    assert refusal().endswith(
        " is not supported by vllm_kvcompress (Scheduler._get_local_prefix_cache_hit has "
        "parameters (self, request, max_cache_hit_length), not (self, request)); "
        "install vllm 0.32 or start without --kv-compression"
    )


def renamed(self: Any, wish: Any, num_computed_tokens: int, num_new_tokens: int) -> None: ...
def reordered(self: Any, request: Any, num_new_tokens: int, num_computed_tokens: int) -> None: ...
def by_name(self: Any, request: Any, *, num_computed_tokens: int, num_new_tokens: int) -> None: ...


@pytest.mark.parametrize("changed", [renamed, reordered, by_name])
def test_names_order_and_kind_count(
    monkeypatch: pytest.MonkeyPatch, changed: Callable[..., None]
) -> None:
    name = "Scheduler._reserve_prefill_lookahead"
    monkeypatch.setattr(f"{SCHEDULER}.{name}", changed)
    found = ", ".join(parameter_names(inspect.signature(changed)))
    wanted = "self, request, num_computed_tokens, num_new_tokens"
    assert f"({name} has parameters ({found}), not ({wanted}))" in refusal()


@pytest.mark.parametrize(
    ("parameters", "fits"),
    [
        ("self, ordered_blocks", True),
        ("self, ordered_blocks, prepend=False", True),
        ("self, ordered_blocks, prepend", False),
        ("self, blocks", False),
        ("self", False),
    ],
)
def test_calls_must_go_through(
    monkeypatch: pytest.MonkeyPatch, parameters: str, fits: bool
) -> None:
    names: dict[str, Any] = {}
    exec(f"def free({parameters}): ...", names)
    monkeypatch.setattr("vllm.v1.core.block_pool.BlockPool.free_blocks", names["free"])
    if fits:
        checks.check_version()
        return
    says = parameters.replace("=False", "")
    assert (
        f"(BlockPool.free_blocks has parameters ({says}) and is called with "
        "(self, ordered_blocks))" in refusal()
    )


def test_arguments_passed_by_name_must_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def register(kvcache_spec_cls: Any, manager_class: Any, base_spec: Any) -> None: ...

    name = "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry.register"
    monkeypatch.setattr(name, staticmethod(register))
    assert "KVCacheSpecRegistry.register has parameters (kvcache_spec_cls, " in refusal()


@pytest.mark.parametrize(
    ("module", "name"),
    [(SCHEDULER, "Scheduler._gone_with_the_refactoring"), ("vllm.v1.core.no_such", "Scheduler")],
)
def test_what_is_missing_is_named(module: str, name: str) -> None:
    table = {module: {name: (Use.CALL, "self")}}
    assert list(differences(table)) == [f"it has no {module}.{name}"]


def test_a_missing_attribute_is_named() -> None:
    table = {SCHEDULER: {"Scheduler": (Use.SUBCLASS, "running runing requests")}}
    assert list(differences(table)) == ["Scheduler has no attribute runing"]


def test_a_worker_checks_what_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def load_model(self) -> None: ...

    class Ours(ArenaWorker, Plain): ...

    def initialize_from_config(self: Any) -> None: ...

    monkeypatch.setattr(arena_worker, "register_backends", lambda: None)
    Ours().load_model()
    importlib.import_module(GPU_WORKER)
    name = "Worker.initialize_from_config"
    monkeypatch.setattr(f"{GPU_WORKER}.{name}", initialize_from_config)
    with pytest.raises(
        checks.Unsupported, match=rf"\({name} has parameters \(self\), not \(self, "
    ):
        Ours().load_model()
    monkeypatch.delitem(sys.modules, GPU_WORKER)
    Ours().load_model()
    checks.check_version()


# --- the table is complete -----------------------------------------------------------------------


def imported() -> set[tuple[str, str]]:
    """Modules of vLLM and names that engine/ imports from them."""
    found = set()
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def test_every_imported_name_is_in_the_table() -> None:
    names = imported()
    assert len(names) > 30
    known = {(module, name) for module, hooks in TABLE.items() for name in hooks}
    owners = {(module, name.split(".")[0]) for module, name in known}
    modules = {tuple(module.rsplit(".", 1)) for module in TABLE}
    assert names - known - owners - modules == set()


def overrides() -> Iterator[tuple[type, str, type]]:
    """A class of ours, a name in it or a base of ours, and the class of vLLM's that has it, too."""
    for info in pkgutil.walk_packages(engine.__path__, f"{engine.__name__}."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for number, owner in enumerate(cls.__mro__):
                if not owner.__module__.startswith("vllm_kvcompress"):
                    continue
                for name in vars(owner):
                    theirs = next((b for b in cls.__mro__[number:] if is_vllms(b, name)), None)
                    if theirs is not None:
                        yield cls, name, theirs


def is_vllms(cls: type, name: str) -> bool:
    return cls.__module__.split(".")[0] == "vllm" and name in vars(cls)


def rows_of(cls: type, name: str, theirs: type) -> list[tuple[Use, str]]:
    """Rows about an attribute of vLLM's class, or of one that has inherited it."""
    bases = [b for b in cls.__mro__ if issubclass(b, theirs)]
    rows = [TABLE.get(base.__module__, {}).get(f"{base.__name__}.{name}") for base in bases]
    return [row for row in rows if row is not None]


def test_every_override_is_in_the_table_and_takes_what_it_says() -> None:
    seen, missing, other = set(), [], []
    for cls, name, theirs in overrides():
        method = getattr(cls, name)
        if not inspect.isroutine(method):
            row = TABLE.get(theirs.__module__, {}).get(theirs.__name__, (Use.READ, ""))
            known = name.startswith("_") or name in row[1].split()
        elif name.startswith("__") and (name != "__init__" or "__dataclass_fields__" in vars(cls)):
            continue  # made by Python
        else:
            rows = [row for row in rows_of(cls, name, theirs) if row[0] is Use.OVERRIDE]
            known = len(rows) == 1
            if known and not takes(parameter_names(inspect.signature(method)), rows[0][1]):
                other.append(f"{cls.__name__}.{name} does not take ({rows[0][1]})")
        seen.add(name)
        if not known:
            missing.append(f"{cls.__name__}.{name} of {theirs.__module__}.{theirs.__name__}")
    assert {"schedule", "build", "forward", "execute_model", "max_memory_usage_bytes"} <= seen
    assert missing == []
    assert other == []


def takes(ours: list[str], relied_on: str) -> bool:
    wanted = relied_on.split(", ") if relied_on else []
    if wanted[-1:] != ["..."]:
        return ours == wanted
    return ours[: len(wanted) - 1] == wanted[:-1] and {"*args", "**kwargs"} <= set(ours)


def test_every_wrapper_takes_what_the_table_says() -> None:
    """Found by its name, which is that of the function it is put around."""
    functions: dict[str, list[list[str]]] = {}
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(without_owner(arguments(node.args)))
    other = []
    for hooks in TABLE.values():
        for name, (use, relied_on) in hooks.items():
            if use is Use.WRAP:
                ours = functions.get(name.rsplit(".", 1)[-1], [])
                wanted = ", ".join(without_owner(relied_on.split(", ")))
                if not any(takes(found, wanted) for found in ours):
                    other.append(f"{name} with ({relied_on})")
    assert other == []


def arguments(args: ast.arguments) -> list[str]:
    names = [arg.arg for arg in args.args]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    return names + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def without_owner(names: list[str]) -> list[str]:
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def used() -> set[str]:
    """All names that occur in engine/, and those in strings."""
    found: set[str] = set()
    for node in (node for tree in TREES for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.alias(name=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Constant(value=str(name)):
                found.add(name)
    return found


def test_no_row_of_the_table_is_unused() -> None:
    names = used()
    unused = []
    for module, hooks in TABLE.items():
        for name, (use, relied_on) in hooks.items():
            attributes = relied_on.split() if use in (Use.SUBCLASS, Use.READ) else []
            needed = attributes or [name.rsplit(".", 1)[-1]]
            unused += [f"{module}.{name}: {word}" for word in needed if word not in names]
    assert unused == []


# --- wrapping ------------------------------------------------------------------------------------


def add_one(original: Callable[..., int]) -> Callable[..., int]:
    return lambda *args: original(*args) + 1


class Owner:
    factor = 2

    def method(self, value: int) -> int:
        return self.factor * value

    @classmethod
    def of_class(cls, value: int) -> int:
        return cls.factor * value

    @staticmethod
    def static(value: int) -> int:
        """Twice."""
        return 2 * value


def test_wrapping_is_done_once() -> None:
    class Own(Owner): ...

    class Other(Owner):
        factor = 10

    for cls in (Own, Owner, Own, Owner):
        wrap_once(cls, "method", add_one)
    # The subclass's own wrapping went around the method as it was then.
    assert (Own().method(3), Owner().method(3), Other().method(3)) == (7, 7, 31)
    for _ in range(2):
        for name in ("of_class", "static"):
            wrap_once(Owner, name, add_one)
    assert (Owner.of_class(3), Other.of_class(3), Other().of_class(3)) == (7, 31, 31)
    assert (Owner.static(3), Owner().static(3)) == (7, 7)
    assert Owner.static.__doc__ == "Twice."


def test_an_object_is_wrapped_alone() -> None:
    one, two = (SimpleNamespace(double=lambda value: 2 * value) for _ in range(2))
    for _ in range(2):
        wrap_once(one, "double", add_one)
    assert (one.double(3), two.double(3)) == (7, 6)

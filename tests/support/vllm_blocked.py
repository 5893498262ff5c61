"""A plugin for pytest, ``-p tests.support.vllm_blocked``: no test can import vLLM.

So that whoever studies or ports methods, paging, planning, eviction or the kernels needs no vLLM.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Blocker(importlib.abc.MetaPathFinder):
    """Refuses vLLM and everything in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(
                f"{fullname}: vLLM is blocked, this part works without it", name=fullname
            )
        return None


if "vllm" in sys.modules:
    raise RuntimeError("vLLM was imported before it could be blocked")
sys.meta_path.insert(0, _Blocker())

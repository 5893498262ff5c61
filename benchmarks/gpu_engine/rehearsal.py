"""The GPU suite without a GPU: vLLM's GPU worker on the CPU, kernels through Triton's interpreter.

vLLM's compiled libraries are blocked from import, so whatever runs here is Python and Triton. What
stands in for the device is what the tests of the GPU path use.
"""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

_COMPILED = ("vllm._C", "vllm._moe_C", "vllm.vllm_flash_attn._vllm_fa")


class _Block(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Raise for vLLM's compiled libraries."""
        if fullname.startswith(_COMPILED):
            raise ImportError(f"{fullname} is blocked: the rehearsal runs vLLM's Python alone")


def begin() -> None:
    """Prepare this process; before anything imports vLLM or Triton."""
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    sys.meta_path.insert(0, _Block())
    # vLLM counts a CPU backend of Triton only where its own version says that it is for the CPU.
    version = importlib.metadata.version

    def as_cpu_build(distribution_name: str) -> str:
        found = version(distribution_name)
        return found + "+cpu" if distribution_name == "vllm" and "cpu" not in found else found

    importlib.metadata.version = as_cpu_build
    import triton.backends

    from tests.support.interpreted_kernels import prepare_once_a_launch

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    prepare_once_a_launch()


@contextlib.contextmanager
def gpu_worker(backend: str | None, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Let an engine that is opened within start vLLM's GPU worker; yields settings to change.

    Args:
        backend: Of attention.
        settings: The engine's.

    """
    import pytest

    from tests.e2e import gpu_worker_stand_in, v2_run

    eager = settings.get("enforce_eager", False)
    job = {"graphs": [] if eager else [1, 2, 4]}
    if "kv_compression" in settings:
        job["method"] = settings["kv_compression"]
    with pytest.MonkeyPatch.context() as patch:
        v2_run._offer_gpu_attention(patch, backend or "TRITON_ATTN")
        changed = gpu_worker_stand_in.install(patch, job, [])
        if "jit_monitor_mode" in settings:
            v2_run.Launches(patch)  # tells vLLM's monitor what would be compiled
        else:
            changed["jit_monitor_mode"] = "warn"
        # Without vLLM's compiled operators its layers compute with PyTorch's.
        changed["compilation_config"]["custom_ops"] = ["none"]
        yield {**changed, "attention_backend": backend or "TRITON_ATTN", "dtype": "float32"}

"""How an engine starts on a GPU: vLLM's own GPU worker, real but for the device.

The worker is derived from vLLM's (``gpu_worker_stand_in.py``), so a start does here what it does
there, in its order. vLLM's JIT monitor is armed with ``error`` and told of every launch that
Triton would have had to compile.
"""

from typing import Any

import pytest
from vllm.v1.worker.gpu_worker import Worker

from tests.e2e.cut_model import first_layers
from tests.e2e.harness import ALL, MODELS, SMALL
from tests.e2e.interpreted import Interpreted

pytestmark = pytest.mark.engine

LIMIT = 300
SETTINGS = {
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 100,
}
CASES = [
    ("FLASH_ATTN", "cake", {}),
    ("FLASH_ATTN", "dynamickv", {}),
    ("FLASH_ATTN", "scatter", {}),
    ("FLASH_ATTN", "none", {"allow": ALL}),
    ("TRITON_ATTN", "cake", {}),
    ("TRITON_ATTN", "snapkv", {}),
]


def start(v2: Interpreted, backend: str, method: str | None, config: Any, **job: Any) -> Any:
    """Start an engine, run a few prompts, some of them longer than a step."""
    if method is not None:
        job |= {"method": method, "budget": None if method == "none" else 48, "config": config}
    return v2.run(
        LIMIT,
        gpu_worker=True,
        backend=backend,
        graphs=[1, 2, 4],
        model=str(first_layers(MODELS / SMALL, 2)),
        settings=SETTINGS,
        **job,
    )


@pytest.mark.parametrize(("backend", "method", "config"), CASES)
def test_vllms_gpu_worker_starts_and_serves(
    v2: Interpreted, prose: list[int], backend: str, method: str, config: dict[str, Any]
) -> None:
    """The real start, in the real order; vLLM's warm-up requests leave nothing behind."""
    prompts = [prose[:70], prose[40:97]]
    result = start(v2, backend, method, config, prompts=prompts, max_tokens=4)
    events = result["events"]
    assert events.index("profile_cudagraph_memory") < events.index("warm_up")
    assert events[events.index("warm_up") :] == [
        "warm_up",
        "compile_or_warm_up_model",
        "warmup_kernels",
        "capture_model",
        "activate",
        "freeze_gc_heap",
        "enable_gpu_sync_check",
    ]
    assert result["left_behind"] == []
    assert result["replayed"] > 0
    assert result["stats"]["prompt_cuts"] == (0 if method == "none" else 2)


def test_the_stand_in_replaces_the_device_alone() -> None:
    from tests.e2e.gpu_worker_stand_in import ArenaOnCPU, OnCPU

    ours = {name for name in vars(OnCPU) if not name.startswith("__")}
    assert ours == {"init_device"}
    assert issubclass(ArenaOnCPU, Worker)
    assert ArenaOnCPU.__mro__[-3] is not None

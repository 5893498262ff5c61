"""How an engine starts on a GPU: vLLM's own GPU worker, real but for the device.

The worker is derived from vLLM's (``gpu_worker_stand_in.py``), so a start does here what it does
there, in its order. vLLM's JIT monitor is armed with ``error`` and told of every launch that
Triton would have had to compile.
"""

from typing import Any

import pytest
from vllm.v1.worker.gpu_worker import Worker

from tests.e2e.cut_model import first_layers
from tests.e2e.harness import MODELS, SMALL
from tests.e2e.interpreted import Interpreted

pytestmark = pytest.mark.engine

LIMIT = 600
SETTINGS = {
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 100,
}
SOME = {"method": ["snapkv", "scatter"], "params": True, "budget": {"min": 1}}
OWN = {"budget": True}
CASES = [
    ("FLASH_ATTN", "cake", {"decode_budget": 48, "decode_buffer": 32, "allow": OWN}, None),
    ("FLASH_ATTN", "none", {"allow": SOME}, "snapkv"),
    ("TRITON_ATTN", "dynamickv", {"allow": OWN}, None),
    pytest.param("FLASH_ATTN", "dynamickv", {}, None, marks=pytest.mark.slow),
    pytest.param("FLASH_ATTN", "scatter", {}, None, marks=pytest.mark.slow),
    pytest.param("FLASH_ATTN", "none", {"allow": SOME}, "scatter", marks=pytest.mark.slow),
    pytest.param("TRITON_ATTN", "cake", {}, None, marks=pytest.mark.slow),
    pytest.param("TRITON_ATTN", "snapkv", {}, None, marks=pytest.mark.slow),
    pytest.param("TRITON_ATTN", "none", {"allow": SOME}, "snapkv", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "method", "config", "asked"), CASES)
def test_vllms_gpu_worker_starts_and_serves(
    v2: Interpreted,
    prose: list[int],
    backend: str,
    method: str,
    config: dict[str, Any],
    asked: str | None,
) -> None:
    """The real start, in the real order; then requests, for which nothing is compiled.

    vLLM's warm-up requests leave nothing behind, and the pool that vLLM proposes for the next start
    leaves room for us.
    """
    extra: dict[str, Any] = {}
    if asked is not None:
        extra = {"kv_compression": asked, "kv_compression_budget": 48}
    if asked == "snapkv":
        extra["kv_compression_config"] = {"window": 21, "kernel": 9, "pooling": "max"}
    result = v2.run(
        LIMIT,
        gpu_worker=True,
        backend=backend,
        graphs=[1, 2, 4],
        model=str(first_layers(MODELS / SMALL, 2)),
        settings=SETTINGS,
        method=method,
        budget=None if method == "none" else 48,
        config=config,
        extra=extra,
        prompts=[prose[:70], prose[40:97]],
        max_tokens=40 if "decode_budget" in config else 4,
    )
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
    # Neither of ours, which would have raised, nor vLLM's attention for tables of ours. For a lone
    # prompt it is compiled late in plain vLLM too, whose warm-up has several.
    late = [key for key in result["late"] if key.startswith("vllm.v1.attention.")]
    assert [key for key in late if "num_seqs=('i32', 1)" not in key] == []
    assert "tables in the pool runtime" in events
    assert result["left_behind"] == []
    ways = {"Compressor.warm_up", "DeviceTableBuilder.capture", "Compressor.cut_all"}
    assert ways <= set(result["inside"])
    assert result["replayed"] > 0
    assert result["stats"]["prompt_cuts"] == 2
    assert (result["stats"]["decode_cuts"] > 0) == ("decode_budget" in config)
    memory = result["memory"]
    assert memory["set_aside"] > 0
    known = memory["consumed"] + memory["graphs"] + memory["set_aside"] + (150 << 20)
    assert memory["proposed"] == memory["requested"] - known


def test_the_stand_in_replaces_the_device_alone() -> None:
    from tests.e2e.gpu_worker_stand_in import ArenaOnCPU, OnCPU

    replaced = {name for name in vars(OnCPU) if not name.startswith("__")}
    assert replaced == {"init_device"}
    theirs = (cls for cls in ArenaOnCPU.__mro__ if cls.__module__.startswith("vllm."))
    assert next(theirs) is Worker

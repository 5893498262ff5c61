"""What is accepted, and wrong settings; the refusals of features are in test_compatibility."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from tests.support.refusals import GEMMA3, SHAPE, Layer, gpu_config, start
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.layer_checks import check_specs
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec


def refusal(root: Path, *names: str, **options: Any) -> None:
    """One line that names what to change."""
    with pytest.raises(ValueError, match=r".") as caught:
        start(root, **options)
    text = str(caught.value)
    assert "\n" not in text, text
    assert [n for n in names if n not in text] == [], text


def test_equal_full_attention_layers_are_accepted() -> None:
    specs: dict[str, KVCacheSpec] = {f"layers.{i}": ArenaSpec(**SHAPE) for i in range(3)}
    check_specs(specs, {name: Layer() for name in specs}, ArenaCPUImpl)


def test_sliding_windows_beside_full_attention_are_accepted() -> None:
    specs = {
        "layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128),
        "layers.1": ArenaSpec(**SHAPE),
    }
    # They stay as they are, so it does not matter what attention they have.
    layers = {"layers.0": Layer(object), "layers.1": Layer()}
    check_specs(specs, layers, ArenaCPUImpl)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "cake", "gama": 1}, ["unknown parameter", "gama", "gamma"]),
        (False, ["must be a mapping", "False"]),
        ({}, ["needs a method"]),
    ],
)
def test_wrong_settings(root: Path, settings: Any, names: list[str]) -> None:
    """The others: tests/planning/test_config.py."""
    refusal(root, *names, settings=settings)


def test_a_budget_below_window_and_one_block(root: Path) -> None:
    small = {"method": "cake", "budget": 63}
    names = ["kv-compression-budget 63", "at least 64", "window 32", "block of 32", "--block-size"]
    refusal(root, *names, settings=small, block_size=32)
    start(root, settings={"method": "cake", "budget": 64}, block_size=32)
    # Nobody gave a block size: CPU's is 128.
    refusal(root, "at least 160", settings={"method": "cake", "budget": 159})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "TRITON_ATTN"])
def test_a_gpu_is_accepted(
    root: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, backend: str | None
) -> None:
    config = gpu_config(root, monkeypatch)
    config.cache_config.cache_dtype = dtype
    config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
    checks.check_config(config)


@pytest.mark.parametrize(
    "options",
    [
        {"model": GEMMA3},
        # Without its window it is a model like any other.
        {"model": GEMMA3, "disable_sliding_window": True, "disable_hybrid_kv_cache_manager": True},
        {"kv_cache_dtype": "bfloat16"},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
        {"block_size": 32},
        {"scheduling_policy": "priority"},
    ],
    ids=", ".join,
)
def test_what_can_be_served_is_not_refused(root: Path, options: dict[str, Any]) -> None:
    config = start(root, **options)
    assert config.parallel_config.worker_cls in checks.WORKERS.values()
    assert config.scheduler_config.scheduler_cls is not None


# --- versions; what vLLM must have: test_hooks.py -------------------------------------------------


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0.0", "dev"])
def test_another_version_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    refusal(root, f"vLLM {version} is not supported", "install vllm 0.32", "--kv-compression")

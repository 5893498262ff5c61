"""What is accepted, and wrong settings; the refusals of features are in test_compatibility."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from tests.support.refusals import GEMMA3, SHAPE, Layer, gpu_config, models_folder, refusal, start
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_folder(tmp_path_factory)


def test_a_plain_model_is_accepted(root: Path) -> None:
    config = start(root)
    assert config.parallel_config.worker_cls in checks.WORKERS.values()
    assert config.scheduler_config.scheduler_cls is not None


def test_a_sliding_window_hybrid_is_served(root: Path) -> None:
    config = start(root, model=GEMMA3)
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.")
    # Without its window it is a model like any other.
    config = start(
        root, model=GEMMA3, disable_sliding_window=True, disable_hybrid_kv_cache_manager=True
    )
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.")


def test_equal_full_attention_layers_are_accepted() -> None:
    specs: dict[str, KVCacheSpec] = {f"layers.{i}": ArenaSpec(**SHAPE) for i in range(3)}
    checks.check_specs(specs, {name: Layer() for name in specs}, ArenaCPUImpl)


def test_sliding_windows_beside_full_attention_are_accepted() -> None:
    specs = {
        "layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128),
        "layers.1": ArenaSpec(**SHAPE),
    }
    # They stay as they are, so it does not matter what attention they have.
    layers = {"layers.0": Layer(object), "layers.1": Layer()}
    checks.check_specs(specs, layers, ArenaCPUImpl)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "snap"}, ["unknown method", "snap", "cake", "dynamickv"]),
        ({"method": "cake", "gama": 1}, ["unknown parameter", "gama", "gamma"]),
        ({"method": "cake", "window": "x"}, ["window", "'x'", "integer"]),
        ({"method": "cake", "budget": "many"}, ["budget", "'many'", "tokens per layer"]),
        ({"budget": 64}, ["needs a method"]),
        ("cake", ["must be a mapping", "'cake'"]),
        (False, ["must be a mapping", "False"]),
        ({}, ["needs a method"]),
    ],
)
def test_wrong_settings(root: Path, settings: Any, names: list[str]) -> None:
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
        {"kv_cache_dtype": "bfloat16"},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
        {"block_size": 32},
        {"scheduling_policy": "priority"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_can_be_served_is_not_refused(root: Path, options: dict[str, Any]) -> None:
    assert start(root, **options).parallel_config.worker_cls in checks.WORKERS.values()


# --- versions; what vLLM must have: test_hooks.py -------------------------------------------------


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0.0", "dev"])
def test_another_version_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    refusal(root, f"vLLM {version} is not supported", "install vllm 0.32", "--kv-compression")


@pytest.mark.parametrize(
    "name", ["Scheduler._reserve_prefill_lookahead", "Scheduler._get_local_prefix_cache_hit"]
)
def test_a_hook_taken_out_of_vllm_is_noticed(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(f"vllm.v1.core.sched.scheduler.{name}")
    refusal(root, f"it has no vllm.v1.core.sched.scheduler.{name}", "install vllm 0.32")

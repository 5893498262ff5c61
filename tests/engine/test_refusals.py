"""What cannot be served is refused before anything is loaded, in one sentence naming a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.config import CUDAGraphMode, KVTransferConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support.refusals import (
    BERT,
    CHUNKED,
    GEMMA3,
    GEMMA3N,
    JAMBA,
    MAMBA,
    MAMBA2,
    MLA,
    MOSTLY_FULL,
    WHISPER,
    check_sentence,
    gpu_config,
    plain_config,
    refusal,
    start,
)
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.plugin import register


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return tmp_path_factory.mktemp("models")


def test_a_plain_model_is_accepted(root: Path) -> None:
    config = start(root)
    assert config.parallel_config.worker_cls in checks.WORKERS.values()
    assert config.scheduler_config.scheduler_cls is not None


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (MLA, ["multi-head latent attention", "drop the flag"]),
        (MAMBA, ["Mamba", "drop the flag"]),
        (MAMBA2, ["Mamba", "drop the flag"]),
        (JAMBA, ["Mamba", "drop the flag"]),
        (WHISPER, ["encoder-decoder", "drop the flag"]),
        (GEMMA3N, ["share KV caches", "drop the flag"]),
        (MOSTLY_FULL, ["fill 5 KV-cache groups", "drop the flag"]),
        (CHUNKED, ["chunked local attention", "drop the flag"]),
        (BERT, ["generate", "drop the flag"]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_served(root: Path, model: dict[str, Any], names: list[str]) -> None:
    refusal(root, "--kv-compression", *names, model=model)


def test_a_sliding_window_hybrid_is_served(root: Path) -> None:
    config = start(root, model=GEMMA3)
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.")
    # Without its window it is a model like any other.
    config = start(
        root, model=GEMMA3, disable_sliding_window=True, disable_hybrid_kv_cache_manager=True
    )
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.")


def test_what_a_sliding_window_hybrid_does_not_get(root: Path) -> None:
    names = ["sliding-window layers", "drop --disable-hybrid-kv-cache-manager"]
    refusal(root, *names, model=GEMMA3, disable_hybrid_kv_cache_manager=True)
    names = ["prefill cascade", "sliding-window layers", "set prefill to auto"]
    refusal(root, *names, model=GEMMA3, settings={"method": "cake", "prefill": "cascade"})


def test_a_generating_model_used_for_pooling(root: Path) -> None:
    refusal(root, "generate", "--kv-compression", runner="pooling", convert="embed")


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


# --- combinations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            },
            ["KV connectors", "--kv-transfer-config"],
        ),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            ["speculative decoding", "--speculative-config"],
        ),
        ({"tensor_parallel_size": 2}, ["tensor", "--tensor-parallel-size", "to 1"]),
        ({"pipeline_parallel_size": 2}, ["pipeline", "--pipeline-parallel-size", "to 1"]),
        ({"kv_cache_dtype": "fp8"}, ["quantized KV cache", "--kv-cache-dtype"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["KV-cache dtype fp8_e5m2", "--kv-cache-dtype"]),
        (
            {"attention_backend": "FLASHINFER"},
            ["FLASHINFER", "--attention-backend", "FLASH_ATTN or TRITON_ATTN"],
        ),
        ({"worker_cls": "my.Worker"}, ["worker my.Worker", "--worker-cls"]),
        ({"scheduler_cls": "my.Scheduler"}, ["custom scheduler", "--scheduler-cls"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_combinations_that_cannot_be_served(
    root: Path, options: dict[str, Any], names: list[str]
) -> None:
    refusal(root, "--kv-compression", *names, **options)


@pytest.mark.parametrize("field", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism(root: Path, field: str) -> None:
    # vLLM itself refuses these on this machine, so a finished configuration is altered.
    config = plain_config(root)
    setattr(config.parallel_config, field, 2)
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "context parallelism", f"--{field.replace('_', '-')}", "to 1")


def test_a_worker_of_another_platform(root: Path) -> None:
    config = plain_config(root)
    config.parallel_config.worker_cls = "vllm.v1.worker.xpu_worker.XPUWorker"
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "xpu_worker.XPUWorker", "GPU", "CPU")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "TRITON_ATTN"])
def test_a_gpu_is_accepted(
    root: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, backend: str | None
) -> None:
    config = gpu_config(root, monkeypatch)
    config.cache_config.cache_dtype = dtype
    config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
    checks.check_config(config)


def test_what_a_gpu_cannot_serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = gpu_config(root, monkeypatch)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "cudagraph_mode FULL", "FULL_AND_PIECEWISE")

    config = gpu_config(root, monkeypatch)
    config.parallel_config.enable_dbo = True
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "dual batch overlap", "--enable-dbo")

    config = gpu_config(root, monkeypatch)
    config.attention_config.backend = AttentionBackendEnum.FLASHINFER
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "FLASHINFER", "FLASH_ATTN or TRITON_ATTN")

    config = gpu_config(root, monkeypatch)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_config(config)
    check_sentence(caught.value, "model runner V1", "VLLM_USE_V2_MODEL_RUNNER=1")


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


def test_offloading_is_refused_by_its_own_name(root: Path) -> None:
    refusal(root, "--kv-offloading-size", kv_offloading_size=1.0)

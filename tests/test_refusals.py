"""What cannot be served is refused before anything is loaded, in one sentence naming a remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.config import CUDAGraphMode, KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.backends.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.spec import ArenaSpec

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 32}
MLA = {
    **BASE,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}
MAMBA2 = {
    **MAMBA,
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "head_dim": 32,
    "num_heads": 4,
    "n_groups": 1,
}
JAMBA = {**BASE, "architectures": ["JambaForCausalLM"], "model_type": "jamba"}
JAMBA["num_hidden_layers"] = 8  # attention comes once in eight layers
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 256,
    "max_target_positions": 448,
    "torch_dtype": "bfloat16",
}
GEMMA3N = {
    **BASE,
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "head_dim": 32,
    "layer_types": ["full_attention"] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
GEMMA3 = {
    **BASE,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "head_dim": 32,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
# vLLM makes groups as large as the rarer kind of layer.
MOSTLY_FULL = {**GEMMA3, "layer_types": ["sliding_attention"] + ["full_attention"] * 5}
CHUNKED = {**LLAMA, "attention_chunk_size": 128}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return tmp_path_factory.mktemp("models")


def start(
    root: Path, model: dict[str, Any] = LLAMA, settings: Any = None, **options: Any
) -> VllmConfig:
    """What every way of starting vLLM does first, on a model that is only a config.json."""
    folder = root / str(model["model_type"])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    if settings is None:
        settings = {"method": "uniform", "budget": 256}
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        additional_config={"kv_compression": settings},
        **options,
    ).create_engine_config()


def check_sentence(error: ValueError, *names: str) -> None:
    """One line that names what to change."""
    text = str(error)
    assert "\n" not in text, text
    assert 20 < len(text) < 300, text
    assert "Error" not in text, text
    assert [n for n in names if n not in text] == [], text


def refusal(root: Path, *names: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        start(root, **options)
    check_sentence(caught.value, *names)


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
    start(root, model=GEMMA3)
    # Without its window it is a model like any other.
    start(root, model=GEMMA3, disable_sliding_window=True, disable_hybrid_kv_cache_manager=True)


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


def gpu_config(root: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """A configuration as a GPU would make it; nothing here can make one."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)  # no configuration for the CPU
    config = plain_config(root)
    config.parallel_config.worker_cls = checks.GPU_WORKER
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    return config


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


def plain_config(root: Path) -> VllmConfig:
    """A finished configuration as it is just before ours is checked."""
    config = copy.deepcopy(start(root))
    config.scheduler_config.scheduler_cls = None
    config.parallel_config.worker_cls = next(w for w in checks.WORKERS if "cpu" in w)
    checks.check_config(config)
    return config


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


# --- versions and hooks --------------------------------------------------------------------------


def test_the_installed_vllm_has_every_hook() -> None:
    assert checks.missing_hooks() == []
    checks.check_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0.0", "dev"])
def test_another_version_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    refusal(root, f"vLLM {version} is not supported", "install vllm 0.32", "--kv-compression")


@pytest.mark.parametrize(
    "hook",
    [
        ("vllm.v1.core.sched.scheduler", "Scheduler._gone_with_the_refactoring"),
        ("vllm.v1.core.no_such_module", "Scheduler"),
    ],
)
def test_a_missing_hook_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, hook: tuple[str, str]
) -> None:
    monkeypatch.setattr(checks, "HOOKS", (*checks.HOOKS, hook))
    refusal(root, ".".join(hook), "is not supported", "install vllm 0.32")


@pytest.mark.parametrize(
    "name", ["Scheduler._reserve_prefill_lookahead", "Scheduler._get_local_prefix_cache_hit"]
)
def test_a_hook_taken_out_of_vllm_is_noticed(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(f"vllm.v1.core.sched.scheduler.{name}")
    assert checks.missing_hooks() == [f"vllm.v1.core.sched.scheduler.{name}"]
    refusal(root, name)


# --- layers --------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.bfloat16,
}


class Layer:
    """An attention layer, as far as the check looks at it."""

    def __init__(self, impl_cls: type[Any] = ArenaCPUImpl) -> None:
        # Without its __init__, which wants a whole model.
        self.impl: Any = object.__new__(impl_cls)
        if issubclass(impl_cls, ArenaCPUImpl):
            setattr(self.impl, "kv_cache_dtype", "auto")  # noqa: B010


def refused_layer(spec: KVCacheSpec, layer: Layer | None = None) -> ValueError:
    """The second of two layers is the wrong one."""
    specs = {"layers.0": ArenaSpec(**SHAPE), "layers.1": spec}
    layers = {"layers.0": Layer(), "layers.1": layer or Layer()}
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_specs(specs, layers, ArenaCPUImpl)
    return caught.value


def test_equal_full_attention_layers_are_accepted() -> None:
    specs: dict[str, KVCacheSpec] = {f"layers.{i}": ArenaSpec(**SHAPE) for i in range(3)}
    checks.check_specs(specs, {name: Layer() for name in specs}, ArenaCPUImpl)


@pytest.mark.parametrize(
    "spec",
    [
        ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=128),
        ArenaSpec(**SHAPE, sliding_window=128),
        ArenaSpec(**SHAPE, attention_chunk_size=128),
        FullAttentionSpec(**SHAPE),
        MLAAttentionSpec(**SHAPE),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_layers_that_do_not_see_the_whole_context(spec: KVCacheSpec) -> None:
    error = refused_layer(spec)
    check_sentence(error, "layers.1", type(spec).__name__, "sliding-window", "drop the flag")


def test_sliding_windows_beside_full_attention_are_accepted() -> None:
    specs = {
        "layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128),
        "layers.1": ArenaSpec(**SHAPE),
    }
    # They stay as they are, so it does not matter what attention they have.
    layers = {"layers.0": Layer(object), "layers.1": Layer()}
    checks.check_specs(specs, layers, ArenaCPUImpl)


def test_a_model_of_sliding_windows_alone() -> None:
    specs: dict[str, KVCacheSpec] = {"layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128)}
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_specs(specs, {"layers.0": Layer()}, ArenaCPUImpl)
    check_sentence(caught.value, "layers.0", "SlidingWindowSpec", "drop the flag")


def test_sliding_windows_with_other_pages() -> None:
    error = refused_layer(SlidingWindowSpec(**{**SHAPE, "head_size": 128}, sliding_window=128))
    check_sentence(error, "layers.1", "pages of another size", "layers.0", "drop the flag")


def test_layers_of_another_shape() -> None:
    error = refused_layer(ArenaSpec(**{**SHAPE, "head_size": 128}))
    check_sentence(error, "layers.1", "another KV-cache shape", "drop --kv-compression")


def test_layers_of_another_backend() -> None:
    error = refused_layer(ArenaSpec(**SHAPE), Layer(object))
    check_sentence(error, "layers.1", "attention object", "set --attention-backend")


def test_layers_that_see_later_tokens() -> None:
    specs: dict[str, KVCacheSpec] = {"layers.0": ArenaSpec(**SHAPE, non_causal=True)}
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_specs(specs, {"layers.0": Layer()}, ArenaCPUImpl)
    check_sentence(caught.value, "layers.0", "drop")


def test_offloading_is_refused_by_its_own_name(root: Path) -> None:
    refusal(root, "--kv-offloading-size", kv_offloading_size=1.0)

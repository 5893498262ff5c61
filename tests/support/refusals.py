"""Models that are only a config.json, and the configurations that compression refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import KVCacheSpec

from tests.support.model_classes import inspect_in_process
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.layer_checks import check_specs
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

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
# vLLM takes the cache's dtype from there only when it makes the layers.
FP8_CACHE = {
    **LLAMA,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    },
}
BERT = {**BASE, "architectures": ["BertModel"], "model_type": "bert"}


MISTRAL = {
    **BASE,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 128,
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 256,
    "seq_length": 512,
    "torch_dtype": "bfloat16",
}
GEMMA4 = {
    **GEMMA3,
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "global_head_dim": 64,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 0,
}
# The second layer is larger; it and the others with full attention cannot share pages.
MIXED = {**GEMMA4, "per_layer_config": {"1": {"head_dim": 64}}}
QWEN2 = {
    **BASE,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 128,
    "max_window_layers": 1,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
QWEN_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "layer_types": ["full_attention", "sliding_attention"],
}
REFUSED_MODELS: dict[str, list[dict[str, Any]]] = {
    "multi-head latent attention (DeepSeek)": [MLA],
    "Mamba, and hybrids with recurrent layers (Jamba)": [MAMBA, MAMBA2, JAMBA],
    "encoder-decoder models (Whisper)": [WHISPER],
    "layers that share KV caches (Gemma 3n)": [GEMMA3N],
    "fewer sliding-window layers than full-attention ones": [MOSTLY_FULL],
    "chunked-local attention (Llama 4)": [CHUNKED],
    "embedding, classification and other pooling models": [BERT],
    "sliding windows in every layer": [MISTRAL],
    "sliding windows in some layers of Qwen 2 and 3, which vLLM does not have either": [
        QWEN2,
        QWEN3,
        QWEN_MOE,
    ],
    "ALiBi": [BLOOM],
    "the same, as the config says": [GEMMA4],
    "full-attention layers of several shapes, as the config says": [MIXED],
}
"""Feature of docs/compatibility.md -> models that are refused because they have it."""


def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models; registers the plugin."""
    register()
    inspect_in_process()
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


def gpu_config(root: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """A configuration as a GPU would make it; nothing here can make one."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)  # no configuration for the CPU
    config = plain_config(root)
    config.parallel_config.worker_cls = checks.GPU_WORKER
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    return config


def plain_config(root: Path) -> VllmConfig:
    """A finished configuration as it is just before ours is checked."""
    config = copy.deepcopy(start(root))
    config.scheduler_config.scheduler_cls = None
    config.parallel_config.worker_cls = next(w for w in checks.WORKERS if "cpu" in w)
    checks.check_config(config)
    return config


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


def refused_layer(spec: KVCacheSpec, layer: Layer | None = None) -> Callable[[], None]:
    """Check two layers, of which the second is the wrong one."""
    specs = {"layers.0": ArenaSpec(**SHAPE), "layers.1": spec}
    layers = {"layers.0": Layer(), "layers.1": layer or Layer()}
    return partial(check_specs, specs, layers, ArenaCPUImpl)

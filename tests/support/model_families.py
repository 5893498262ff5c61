"""Small random models of the families that vLLM serves, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    **_IDS,
}
_GPT: dict[str, Any] = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 2048, **_IDS}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "topk_method": "greedy",
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_WINDOW: dict[str, Any] = {"sliding_window": 128}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SCALED: dict[str, Any] = {"rope_theta": 10000.0, "factor": 4.0}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **_SCALED, **settings}}


_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, RoPE of Llama 3": ("llama", _rope("llama3", **_LLAMA3)),
    "Llama, YaRN": ("llama", _rope("yarn", original_max_position_embeddings=512)),
    "Llama, dynamic RoPE": ("llama", _rope("dynamic")),
    "Qwen2": ("qwen2", {}),
    "Qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, **_WINDOW, "max_window_layers": 2},
    ),
    "Qwen2-MoE": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    "Qwen3": ("qwen3", {"head_dim": 64}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"head_dim": 32, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "Qwen3-Next": (
        "qwen3_next",
        {
            "head_dim": 32,
            **_EXPERTS,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, windows": ("mistral", _WINDOW),
    "Ministral": (
        "ministral",
        {**_WINDOW, "head_dim": 32, "layer_types": [_FULL, _SLIDING] * 2},
    ),
    "Mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Phi": ("phi", {"num_key_value_heads": 4}),
    "Phi-3": ("phi3", {"sliding_window": None}),
    "Phi-3, windows": ("phi3", _WINDOW),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma": ("gemma", {**_TIED, "head_dim": 32}),
    "Gemma 2": (
        "gemma2",
        {
            **_TIED,
            **_WINDOW,
            "head_dim": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            **_TIED,
            **_WINDOW,
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": [_SLIDING] * 5 + [_FULL],
        },
    ),
    "Gemma 3n": (
        "gemma3n_text",
        {
            **_TIED,
            **_WINDOW,
            "num_hidden_layers": 10,
            "head_dim": 32,
            "num_kv_shared_layers": 5,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "layer_types": ([_SLIDING] * 4 + [_FULL]) * 2,
        },
    ),
    "Gemma 4": (
        "gemma4_text",
        {
            **_TIED,
            **_WINDOW,
            "num_hidden_layers": 6,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "layer_types": [_SLIDING] * 5 + [_FULL],
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            **_WINDOW,
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": [_SLIDING, _FULL] * 2,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", _WINDOW),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GLM": ("glm", {"head_dim": 32}),
    "GLM-4": ("glm4", {"head_dim": 32}),
    "GLM-4-MoE": ("glm4_moe", {**_ROUTED, "head_dim": 32}),
    "Granite": (
        "granite",
        {
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "Granite-MoE": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.1},
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "shared_intermediate_size": 64,
        },
    ),
    "StableLM": ("stablelm", {"num_key_value_heads": 4}),
    "GPT-2": ("gpt2", _GPT),
    "GPT-J": ("gptj", {**_GPT, "rotary_dim": 16}),
    "GPT-BigCode": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "StarCoder2": ("starcoder2", {**_TIED, "sliding_window": None}),
    "Falcon, ALiBi": (
        "falcon",
        {
            "alibi": True,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "ffn_hidden_size": 192,
        },
    ),
    "Falcon, one KV head": (
        "falcon",
        {
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "ffn_hidden_size": 512,
        },
    ),
    "Falcon-H1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "head_dim": 32,
        },
    ),
    "Bloom": ("bloom", {"hidden_size": 128, "n_layer": 4, "n_head": 4, **_IDS}),
    "OPT": ("opt", {"ffn_dim": 192, "word_embed_proj_dim": 128, "num_key_value_heads": 4}),
    "Cohere": ("cohere", _TIED),
    "Cohere 2": (
        "cohere2",
        {**_TIED, **_WINDOW, "head_dim": 32, "layer_types": [_SLIDING] * 3 + [_FULL]},
    ),
    "SmolLM3": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": False}),
    "EXAONE 4": (
        "exaone4",
        {**_WINDOW, "sliding_window_pattern": 4, "layer_types": [_SLIDING] * 3 + [_FULL]},
    ),
    "Llama 4": (
        "llama4_text",
        {
            "head_dim": 32,
            "intermediate_size_mlp": 192,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 128,
            "interleave_moe_layer_step": 2,
        },
    ),
    "DeepSeek-V2": ("deepseek_v2", {**_ROUTED, **_LATENT}),
    "dots.llm1": ("dots1", {**_ROUTED, "head_dim": 32, "sliding_window": None}),
    "MiniMax-M2": (
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    "Nemotron": ("nemotron", {"head_dim": 32}),
    "Apertus": ("apertus", {}),
    "Seed-OSS": ("seed_oss", {"head_dim": 32}),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 32}),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 32}),
    "Arcee": ("arcee", {}),
    "nanochat": ("nanochat", {}),
    "LFM2": (
        "lfm2",
        {
            "conv_L_cache": 3,
            "layer_types": ["conv", _FULL] * 2,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "Mamba": (
        "mamba",
        {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 16, "pad_token_id": 0, **_IDS},
    ),
}
"""Name of a family -> its ``model_type`` in transformers, and what differs from the sizes above."""

_OF_ITS_OWN = ("gpt2", "gptj", "gpt_bigcode", "bloom", "mamba")
"""Types whose sizes have other names."""


def make_model(family: str, folder: Path) -> None:
    """Write a model with random weights that make attention matter.

    Raises:
        ValueError, AttributeError, KeyError: Transformers cannot make it.

    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = FAMILIES[family]
    sizes = own if kind in _OF_ITS_OWN else {**_SIZES, **own}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    config.dtype = torch.float32
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                # Tokens must differ, and layers must not drown each other.
                weight.normal_(0, 0.5 if "embed" in name or "wte" in name else 0.08)
            elif "sink" in name:
                weight.normal_(0, 1.0)
    model.save_pretrained(folder)

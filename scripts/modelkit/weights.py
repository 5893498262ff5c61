"""Weights and configuration: from llama.cpp's names and layouts to Hugging Face's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, quants

from modelkit import ModelError

Fields = dict[str, Any]
Array = npt.NDArray[np.float32]

IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Architecture:
    """What differs between the two families that are read here."""

    hf_class: str
    permuted: bool
    """llama.cpp stores Q and K for its interleaved rotation, so their rows must go back."""
    extra: tuple[tuple[str, Any], ...]
    """Entries of config.json that no GGUF field has."""


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        permuted=True,
        extra=(("attention_bias", False), ("mlp_bias", False), ("initializer_range", 0.0416)),
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        permuted=False,
        extra=(("use_sliding_window", False), ("attention_dropout", 0.0)),
    ),
}


def architecture(fields: Fields) -> Architecture:
    name = fields["general.architecture"]
    if name not in ARCHITECTURES:
        raise ModelError(f"The GGUF is of architecture {name}, which this script cannot convert.")
    return ARCHITECTURES[name]


def hyperparameter(fields: Fields, key: str) -> Any:
    return fields[f"{fields['general.architecture']}.{key}"]


def unpermute(weight: Array, heads: int) -> Array:
    """Rows (head, D/2, 2) as llama.cpp keeps them, to (head, 2, D/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tensors(reader: GGUFReader, fields: Fields) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors, dequantised, under their Hugging Face names."""
    arch = architecture(fields)
    heads = {
        "attn_q": hyperparameter(fields, "attention.head_count"),
        "attn_k": hyperparameter(fields, "attention.head_count_kv"),
    }
    names = {tensor.name for tensor in reader.tensors}
    # The models tie input and output embedding. Where the file stores both, `output` is the one
    # quantised with more bits.
    embedding = "output.weight" if "output.weight" in names else "token_embd.weight"
    whole = {embedding: EMBEDDING, "output_norm.weight": "model.norm.weight"}

    for tensor in reader.tensors:
        if tensor.name in whole:
            name, kind = whole[tensor.name], ""
        elif tensor.name == "token_embd.weight":
            continue
        else:
            _, layer, kind, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{IN_LAYER[kind]}.{suffix}"
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if arch.permuted and kind in heads:
            weight = unpermute(weight, heads[kind])
        yield name, torch.from_numpy(np.ascontiguousarray(weight))


def special_ids(fields: Fields) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def config(fields: Fields, dtype: str) -> dict[str, Any]:
    """The contents of config.json."""

    def get(key: str) -> Any:
        return hyperparameter(fields, key)

    arch = architecture(fields)
    heads, theta = get("attention.head_count"), get("rope.freq_base")
    ids = special_ids(fields)
    return {
        "architectures": [arch.hf_class],
        "model_type": fields["general.architecture"],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        # Stored as float32, written as the decimal it came from.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": ids["eos_token_id"],
        "pad_token_id": ids["pad_token_id"],
        "dtype": dtype,
        # Without a version transformers suspects the tokenizer of a defect of later releases.
        "transformers_version": "4.51.3",
        **dict(arch.extra),
    }


def generation_config(fields: Fields) -> dict[str, Any]:
    """The contents of generation_config.json: generation also stops at the end of a document."""
    ids = special_ids(fields)
    stops = list(dict.fromkeys([ids["eos_token_id"], ids["pad_token_id"]]))
    return {**ids, "eos_token_id": stops if len(stops) > 1 else stops[0]}

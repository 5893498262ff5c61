"""Weights and configuration: from llama.cpp's names and layouts to Hugging Face's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map, quants
from transformers import AutoConfig, AutoModelForCausalLM

from modelkit import ModelError

Fields = dict[str, Any]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Architecture:
    """What differs between the families that are read here."""

    hf_class: str
    model_type: str
    extra: Callable[[Fields], Fields]
    """Entries of config.json that other families do not have, or that no GGUF field has."""
    permuted: bool = False
    """llama.cpp stores Q and K for its interleaved rotation, so their rows must go back."""
    norm_offset: float = 0.0
    """What llama.cpp adds to the weights of norms."""


def hyperparameter(fields: Fields, key: str) -> Any:
    return fields[f"{fields['general.architecture']}.{key}"]


def gemma3_config(fields: Fields) -> Fields:
    """Entries of Gemma 3: five sliding-window layers, then one that sees everything, and again."""
    layers = range(1, hyperparameter(fields, "block_count") + 1)
    theta = hyperparameter(fields, "rope.freq_base")
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hyperparameter(fields, "attention.key_length"),
        "sliding_window": hyperparameter(fields, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if n % 6 else "full_attention" for n in layers],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "rope_local_base_freq": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "llama",
        lambda _: {"attention_bias": False, "mlp_bias": False, "initializer_range": 0.0416},
        permuted=True,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        lambda _: {"use_sliding_window": False, "attention_dropout": 0.0},
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        gemma3_config,
        norm_offset=1.0,
    ),
}


def architecture(fields: Fields) -> Architecture:
    name = fields["general.architecture"]
    if name not in ARCHITECTURES:
        raise ModelError(f"The GGUF is of architecture {name}, which this script cannot convert.")
    return ARCHITECTURES[name]


def unpermute(weight: Array, heads: int) -> Array:
    """Rows (head, D/2, 2) as llama.cpp keeps them, to (head, 2, D/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tensors(
    reader: GGUFReader, fields: Fields, settings: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors, dequantised, under the names that a model with these settings has for them."""
    arch = architecture(fields)
    heads = {
        "q_proj": hyperparameter(fields, "attention.head_count"),
        "k_proj": hyperparameter(fields, "attention.head_count_kv"),
    }
    stored = {tensor.name: tensor for tensor in reader.tensors}
    # The models tie input and output embedding. Where the file stores both, `output` is the one
    # quantised with more bits.
    stored.setdefault("output.weight", stored["token_embd.weight"])
    stored["token_embd.weight"] = stored["output.weight"]
    number = next(
        n for n, name in MODEL_ARCH_NAMES.items() if name == fields["general.architecture"]
    )
    names = get_tensor_name_map(number, hyperparameter(fields, "block_count"))
    with torch.device("meta"):
        layout = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, _ in layout.named_parameters():
        tensor = stored[names.get_name(name, (".weight", ".bias"))]
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = name.split(".")[-2]
        if arch.permuted and kind in heads:
            weight = unpermute(weight, heads[kind])
        if kind.endswith("norm"):
            weight = weight - arch.norm_offset
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
    return {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": fields.get(
            f"{fields['general.architecture']}.attention.key_length",
            get("embedding_length") // heads,
        ),
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        # Stored as float32, written as the decimal it came from.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "use_cache": True,
        **special_ids(fields),
        "dtype": dtype,
        # Without a version transformers suspects the tokenizer of a defect of later releases.
        "transformers_version": "4.51.3",
        **arch.extra(fields),
    }


def generation_config(fields: Fields) -> dict[str, Any]:
    """The contents of generation_config.json: generation also stops at the end of a document."""
    ids = special_ids(fields)
    stops = list(dict.fromkeys([ids["eos_token_id"], ids["pad_token_id"]]))
    return {**ids, "eos_token_id": stops if len(stops) > 1 else stops[0]}

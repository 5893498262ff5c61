"""What a plan needs of a model, read from its configuration without its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from vllm_kvcompress.planning.layer_groups import LayerGroups, compressed_numbers, group_layers
from vllm_kvcompress.tools.arguments import CommandError

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Where vLLM looks for the longest context: the least of them counts."""

_ROPE_ALREADY_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "default")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
_IMAGES_SEE_LATER = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
_STATE_KEYS = ("state_size", "ssm_state_size", "mamba_d_state")
_NO_TEXT = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a model's KV cache.

    Attributes:
        name: What ``vllm serve`` is given: a folder or a hub id.
        architecture: Its class, or its type where the configuration names none.
        layers: Of the whole model.
        groups: Those of them with full attention, which are compressed, and the others.
        compressed: Numbers of those that are compressed; empty: all.
        heads: Query heads H.
        kv_heads: KV heads N.
        head_size: D.
        dtype: Of weights and activations, as served.
        max_model_len: Tokens of the longest context that vLLM allows; None: not stated.
        default_model_len: What vLLM takes without --max-model-len; None: not stated.
        quantized: Whether the weights are stored in another way than as plain numbers.

    """

    name: str
    architecture: str
    layers: int
    groups: LayerGroups
    compressed: tuple[int, ...]
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_model_len: int | None
    default_model_len: int | None
    quantized: bool


def load_config(model: str) -> Any:
    """Read a configuration of transformers.

    Args:
        model: A folder, a config.json, or a hub id.

    Raises:
        CommandError: There is none, or transformers does not know the type of model.

    """
    transformers.logging.set_verbosity_error()
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(f"--model {model}: the folder has no config.json")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if not path.exists() and isinstance(error, OSError):
            raise CommandError(
                f"--model {model} is neither a folder with a config.json, nor such a file, nor a "
                "model of the hub that can be read from here"
            ) from None
        # Of a check that failed the cause is the last line; else the first sentence is enough.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        last = isinstance(error, StrictDataclassError)
        reason = (lines[-1] if last else lines[0]).split(". ")[0].rstrip(".")
        raise CommandError(
            f"--model {model}: transformers {transformers.__version__} cannot read the "
            f"configuration ({reason})"
        ) from None


def model_facts(model: str, config: Any, dtype: str) -> ModelFacts:
    """Read the shape of the KV cache, by the rules of vLLM.

    Args:
        model: As the user named it.
        config: From :func:`load_config`.
        dtype: ``auto``, or a floating-point type by its name in torch.

    Raises:
        CommandError: A model that compression cannot serve, or one whose shape is not stated.

    """
    text = config.get_text_config()
    check_supported(config, text)
    heads, layers = _number(text, "num_attention_heads"), _number(text, "num_hidden_layers")
    types = getattr(text, "layer_types", None) or ()
    groups = _groups(text, types, layers)
    longest, default = _lengths(text)
    path = Path(model)
    return ModelFacts(
        name=str(path.parent) if path.is_file() else model,
        architecture=(getattr(config, "architectures", None) or [config.model_type])[0],
        layers=layers,
        groups=groups,
        compressed=compressed_numbers(types, groups),
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_size=getattr(text, "head_dim", None) or _number(text, "hidden_size") // heads,
        dtype=_dtype(config, text, dtype),
        max_model_len=longest,
        default_model_len=default,
        quantized=getattr(config, "quantization_config", None) is not None,
    )


def check_supported(config: Any, text: Any) -> None:
    """Refuse what the engine refuses at start, as far as a configuration shows it.

    Args:
        config: Of the whole model.
        text: Of its language model; the same object where there is nothing else.

    Raises:
        CommandError: One sentence, the first reason found.

    """
    for applies, what in _refusals(config, text):
        if applies:
            raise CommandError(
                f"{what} not supported with --kv-compression, so {config.model_type} cannot be "
                "compressed"
            )


def _refusals(config: Any, text: Any) -> list[tuple[bool, str]]:
    types = set(
        getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    )
    others = sorted(types - {"full_attention", "attention", "sliding_attention"})
    # Without types of its own every layer has the window, if there is one.
    local = types == {"sliding_attention"} or (
        not types and bool(getattr(text, "use_sliding_window", True))
    )
    names = getattr(config, "architectures", None) or ()
    return [
        (
            bool(names) and all(name.endswith(_NO_TEXT) for name in names),
            "models that do not generate text are",
        ),
        (bool(getattr(config, "is_encoder_decoder", False)), "encoder-decoder models are"),
        (
            getattr(text, "kv_lora_rank", None) is not None or hasattr(text, "compress_ratios"),
            "models with multi-head latent attention (MLA) are",
        ),
        (
            bool(getattr(text, "num_kv_shared_layers", 0)),
            "models whose layers share KV caches are",
        ),
        (
            bool({"linear_attention", "mamba", "recurrent", "hybrid", "conv"} & types)
            or text.model_type == "rwkv"
            or (not types and any(getattr(text, key, None) for key in _STATE_KEYS)),
            "Mamba and other recurrent models are",
        ),
        (
            getattr(config, "is_mm_prefix_lm", config.model_type in _IMAGES_SEE_LATER),
            "models whose images see later tokens are",
        ),
        (
            "chunked_attention" in types or bool(getattr(text, "attention_chunk_size", None)),
            "models with chunked local attention are",
        ),
        (
            local and bool(getattr(text, "sliding_window", None)),
            "models of sliding windows alone, with no layer that attends to the whole context, are",
        ),
        (bool(others), f"layers of type {', '.join(others)} are"),
        (
            bool(getattr(text, "alibi", False))
            or text.model_type == "bloom"
            or bool(getattr(getattr(text, "attn_config", None), "alibi", False)),
            "models with ALiBi are",
        ),
        (
            bool(getattr(text, "is_heterogeneous", False))
            or bool(getattr(text, "block_configs", None)),
            "layers with KV caches of different shapes are",
        ),
    ]


def _groups(text: Any, types: Sequence[str], layers: int) -> LayerGroups:
    """Which layers are compressed; refuses what engine/checks.py refuses of them."""
    groups = group_layers(types, layers, getattr(text, "sliding_window", None))
    if groups.full_groups > 1:
        raise CommandError(
            f"a model whose full-attention layers fill {groups.full_groups} KV-cache groups is "
            f"not supported with --kv-compression, so {text.model_type} cannot be compressed"
        )
    return groups


def _number(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CommandError(
            f"the configuration of {text.model_type} has no usable {name}: it must be a whole "
            f"number of at least 1, got {value!r}"
        )
    return value


def _kv_heads(text: Any, heads: int) -> int:
    if text.model_type == "falcon" and not text.new_decoder_architecture and text.multi_query:
        return 1
    if text.model_type == "gpt_bigcode" and text.multi_query:
        return 1
    if text.model_type == "dbrx":
        return int(getattr(text.attn_config, "kv_n_heads", heads))
    for name in _KV_HEADS:
        if getattr(text, name, None) is not None:
            return _number(text, name)
    return heads


def _lengths(text: Any) -> tuple[int | None, int | None]:
    """The longest context that vLLM allows, and the one it takes by default."""
    stated = [int(value) for name in _LENGTHS if (value := getattr(text, name, None))]
    if not stated:
        return None, None
    longest = float(min(stated))
    ropes = _ropes(text)
    for rope in ropes:
        if rope["rope_type"] not in _ROPE_ALREADY_SCALED:
            longest = min(stated) * (rope.get("factor") or 1.0)
    if any(rope["rope_type"] == "longrope" for rope in ropes):
        original = getattr(text, "original_max_position_embeddings", None) or longest
        return int(longest), int(original)
    return int(longest), int(longest)


def _ropes(text: Any) -> list[dict[str, Any]]:
    """RoPE parameters: one set, or one for each type of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [each for each in sets if "rope_type" in each]


def _dtype(config: Any, text: Any, asked: str) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    # vLLM serves fp32 checkpoints, and those that do not say, in the device's preferred type.
    if stored is None or stored == torch.float32:
        return torch.bfloat16
    return stored

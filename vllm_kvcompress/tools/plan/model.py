"""What a plan needs of a model: vLLM's own reading of its configuration, without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError

from vllm_kvcompress.planning.layer_groups import LayerGroups, compressed_numbers
from vllm_kvcompress.planning.workspace_memory import ModelShape
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.engine_arguments import sentence

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_SHAPE = ("head_size", "total_num_attention_heads", "total_num_hidden_layers", "total_num_kv_heads")


@dataclass(frozen=True)
class ServedModel:
    """A model as vLLM serves it.

    Attributes:
        name: The model's folder or hub id, for ``vllm serve``.
        architecture: Name of its class.
        layers: Number of layers of the whole model.
        groups: The layers with full attention, which are compressed, and the others.
        compressed: Numbers of the compressed layers; empty: all layers.
        heads: Number of query heads H.
        kv_heads: Number of KV heads N.
        head_size: Elements of a head D.
        dtype: Type of weights and activations, as served.
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

    @property
    def shape(self) -> ModelShape:
        """Sizes of the compressed layers."""
        layers, itemsize = self.groups.compressed, self.dtype.itemsize
        return ModelShape(layers, self.heads, self.kv_heads, self.head_size, itemsize)

    def page_bytes(self, block_size: int, cache_dtype: str = "auto") -> int:
        """Bytes of one layer's keys and values in a block."""
        itemsize = 1 if cache_dtype.startswith("fp8") else self.dtype.itemsize
        return 2 * self.kv_heads * self.head_size * block_size * itemsize

    def block_bytes(self, block_size: int, cache_dtype: str = "auto") -> int:
        """Bytes of a block."""
        return self.groups.pages_of_block(self.layers) * self.page_bytes(block_size, cache_dtype)


def read_model(name: str, dtype: str) -> tuple[ServedModel, Any]:
    """Read a model's configuration. Imports vLLM.

    Args:
        name: A folder, its config.json, or a hub id.
        dtype: ``auto``, or a floating-point type by its name in torch.

    Returns:
        The model, and its configuration as an object of transformers.

    Raises:
        CommandError: There is no configuration, vLLM cannot use it, or compression does not
            support the model.

    """
    from vllm_kvcompress.engine.checks import Unsupported, check_model
    from vllm_kvcompress.engine.model_layers import layer_shapes, layer_types, layers_of_model

    path = Path(name)
    folder = str(path.parent) if path.name == "config.json" and path.is_file() else name
    config = _model_config(name, folder, dtype)
    try:
        check_model(config)
    except Unsupported as error:
        raise CommandError(str(error)) from None
    _check_shape(name, config)
    groups, shape = layers_of_model(config), layer_shapes(config)[0][0]
    stated = config.model_arch_config.derived_max_model_len_and_key[0]
    # With LongRoPE vLLM's default is below what it allows, with other RoPE types it is above what
    # the configuration states.
    known = stated != float("inf")
    model = ServedModel(
        name=folder,
        architecture=config.architectures[0],
        layers=config.get_total_num_hidden_layers(),
        groups=groups,
        compressed=compressed_numbers(layer_types(config), groups),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        dtype=config.dtype,
        max_model_len=max(config.max_model_len, int(stated)) if known else None,
        default_model_len=config.max_model_len if known else None,
        quantized=config.is_quantized,
    )
    return model, config.hf_config


def _model_config(name: str, folder: str, dtype: str) -> "ModelConfig":
    """Return vLLM's configuration of the model alone: an engine's depends on this machine."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        arguments = EngineArgs(model=folder, dtype=dtype, skip_tokenizer_init=True)
        return arguments.create_model_config()
    except (OSError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        path = Path(folder)
        if path.is_dir() and not (path / "config.json").is_file():
            reason = ": the folder has no config.json"
        elif not path.exists() and isinstance(error, OSError | HFValidationError):
            reason = (
                " is neither a folder with a config.json, nor such a file, nor a model of the hub "
                "that can be read from here"
            )
        else:
            reason = f": vLLM cannot use the configuration ({_reason(error)})"
        raise CommandError(f"--model {name}{reason}") from None


def _reason(error: Exception) -> str:
    """First sentence of an error; where a field has the wrong type, it is on the last line."""
    lines = [line.strip() for line in sentence(error).splitlines() if line.strip()]
    last = isinstance(error, StrictDataclassError)
    return (lines or [repr(error)])[-1 if last else 0].split(". ")[0].rstrip(".")


def _check_shape(name: str, config: "ModelConfig") -> None:
    """Refuse what the figures have no place for."""
    for field in _SHAPE:
        if getattr(config.model_arch_config, field) < 1:
            raise CommandError(f"--model {name}: the configuration states no {field}")

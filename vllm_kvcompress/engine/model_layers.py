"""Which layers of an engine's model are compressed, and how vLLM groups the rest.

Read from the config alone; the worker compares it with vLLM's real groups once they exist.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.config import ModelConfig, VllmConfig

from vllm_kvcompress.planning.layer_groups import LayerGroups, compressed_numbers, group_layers

__all__ = [
    "LayerGroups",
    "LayerShape",
    "layer_shapes",
    "layer_types",
    "layers_of",
    "layers_of_model",
    "pool_for_arena",
]


class LayerShape(NamedTuple):
    """Sizes of one layer's attention.

    Attributes:
        heads: Number of query heads H.
        kv_heads: Number of KV heads N.
        head_size: Elements of a head D.

    """

    heads: int
    kv_heads: int
    head_size: int

    @property
    def page(self) -> int:
        """Elements of one token's keys."""
        return self.kv_heads * self.head_size


def layers_of(vllm_config: VllmConfig) -> LayerGroups:
    """Return :func:`layers_of_model` for the model of an engine."""
    return layers_of_model(vllm_config.model_config)


def layers_of_model(model: ModelConfig) -> LayerGroups:
    """Return what the model's config says of its layers.

    Args:
        model: vLLM's configuration of the model; it has all layers of the model, as pipeline
            parallelism is refused.

    """
    return group_layers(
        layer_types(model),
        model.get_total_num_hidden_layers(),
        model.get_sliding_window(),  # None if the user disabled it
    )


def layer_types(model: ModelConfig) -> Sequence[str]:
    """Return the kind of each layer, as transformers names it; empty: all are of one kind."""
    types: Sequence[str] = getattr(model.hf_text_config, "layer_types", None) or ()
    return types


def layer_shapes(model: ModelConfig) -> tuple[list[LayerShape], list[LayerShape]]:
    """Return the shapes of the compressed layers and of the others, each shape once.

    Args:
        model: As for :func:`layers_of_model`. Only its numbers of the whole model are looked at
            where no layer differs.

    """
    arch, groups = model.model_arch_config, layers_of_model(model)
    if arch.per_layer_overrides is None:
        shape = LayerShape(
            arch.total_num_attention_heads, model.get_total_num_kv_heads(), model.get_head_size()
        )
        return [shape], [shape] if groups.window_groups else []
    numbers = range(len(arch.per_layer_overrides))
    compressed = set(compressed_numbers(layer_types(model), groups) or numbers)
    found: tuple[dict[LayerShape, None], dict[LayerShape, None]] = ({}, {})
    for number in numbers:
        one = arch[number]
        shape = LayerShape(one.total_num_attention_heads, one.total_num_kv_heads, one.head_size)
        found[number not in compressed][shape] = None
    return list(found[0]), list(found[1])


def pool_for_arena(vllm_config: VllmConfig, blocks: int, block_size: int) -> int:
    """Return how many blocks of a pool the compressed layers of one request can have.

    Args:
        vllm_config: A finished configuration.
        blocks: Number of blocks that can be handed out.
        block_size: Tokens per block.

    """
    most = vllm_config.model_config.max_model_len
    in_flight = vllm_config.max_in_flight_tokens
    return blocks - layers_of(vllm_config).window_group_blocks(block_size, most, in_flight)

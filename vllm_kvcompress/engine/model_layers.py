"""Which layers of an engine's model are compressed, and how vLLM groups the rest.

Read from the config alone; the worker compares it with vLLM's real groups once they exist.
"""

from collections.abc import Sequence

from vllm.config import ModelConfig, VllmConfig

from vllm_kvcompress.planning.layer_groups import LayerGroups, group_layers

__all__ = ["LayerGroups", "layer_types", "layers_of", "layers_of_model", "pool_for_arena"]


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

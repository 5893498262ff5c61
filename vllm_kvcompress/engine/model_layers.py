"""Which layers of an engine's model are compressed, and how vLLM groups the rest.

Read from the config alone; the worker holds it against vLLM's real groups once there are some.
"""

from vllm.config import VllmConfig

from vllm_kvcompress.planning.layer_groups import LayerGroups, group_layers

__all__ = ["LayerGroups", "layers_of", "pool_for_arena"]


def layers_of(vllm_config: VllmConfig) -> LayerGroups:
    """Return what the model's config says of its layers.

    Args:
        vllm_config: A finished configuration.

    """
    model = vllm_config.model_config
    return group_layers(
        getattr(model.hf_text_config, "layer_types", None) or (),
        model.get_num_layers(vllm_config.parallel_config),
        model.get_sliding_window(),  # None if the user disabled it
    )


def pool_for_arena(vllm_config: VllmConfig, blocks: int, block_size: int) -> int:
    """Blocks of a pool that the compressed layers of one request can count on.

    Args:
        vllm_config: A finished configuration.
        blocks: All that can be handed out.
        block_size: Tokens per block.

    """
    most = vllm_config.model_config.max_model_len
    in_flight = vllm_config.max_in_flight_tokens
    return blocks - layers_of(vllm_config).window_group_blocks(block_size, most, in_flight)

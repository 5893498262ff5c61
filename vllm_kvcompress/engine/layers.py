"""Which layers of a model are compressed, and how vLLM groups the rest, from its config alone.

Scheduler, worker and front end must agree on this before any of them has seen the layers; the
worker holds it against vLLM's real groups once there are some.
"""

from dataclasses import dataclass

from vllm.config import VllmConfig

_CROWDED = 1.5
"""With fewer than this many times the layers of the rarer kind, the other kind sets the size."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes:
        compressed: Layers that attend to the whole context.
        full_groups: KV-cache groups that vLLM makes of them.
        side_groups: Groups of sliding-window layers, which stay plain vLLM's; 0: no hybrid.
        window: Their window in tokens; 0 without any.

    """

    compressed: int
    full_groups: int = 1
    side_groups: int = 0
    window: int = 0

    def side_blocks(self, block_size: int, tokens: int, in_flight: int) -> int:
        """Most blocks that a request's sliding-window groups hold at one time.

        Args:
            block_size: Tokens per block.
            tokens: Most tokens of the request.
            in_flight: Most of them that are scheduled and not processed.

        """
        whole = -(-tokens // block_size)
        # The window's first token may be anywhere in its block.
        seen = -(-(self.window - 1 + in_flight) // block_size) + 1
        return self.side_groups * min(whole, seen)


def layers_of(vllm_config: VllmConfig) -> Layers:
    """Return what the model's config says of its layers.

    Args:
        vllm_config: A finished configuration.

    """
    model = vllm_config.model_config
    total = model.get_num_layers(vllm_config.parallel_config)
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    local = sum(kind == "sliding_attention" for kind in kinds)
    full = total - local
    window = model.get_sliding_window()  # None if the user disabled it
    if not local or not window or full <= 0:
        return Layers(total)
    fewest, most = sorted((full, local))
    size = most if most < fewest * _CROWDED else fewest
    return Layers(full, -(-full // size), -(-local // size), int(window))


def pool_for_arena(vllm_config: VllmConfig, blocks: int, block_size: int) -> int:
    """Blocks of a pool that the compressed layers of one request can count on.

    Args:
        vllm_config: A finished configuration.
        blocks: All that can be handed out.
        block_size: Tokens per block.

    """
    most = vllm_config.model_config.max_model_len
    in_flight = vllm_config.max_in_flight_tokens
    return blocks - layers_of(vllm_config).side_blocks(block_size, most, in_flight)

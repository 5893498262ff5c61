"""Which layers of a model are compressed, and how vLLM groups the rest, by their types alone.

Whoever plans before there are any layers must agree on this: scheduler, worker, front end and
``kvcompress plan``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.paging.rounding import cdiv

_CROWDED = 1.5
"""With fewer than this many times the layers of the rarer kind, the other kind sets the size."""


@dataclass(frozen=True)
class LayerGroups:
    """The layers of a model.

    Attributes:
        compressed: Layers that attend to the whole context.
        full_groups: KV-cache groups that vLLM makes of them.
        window_groups: Groups of sliding-window layers, which stay plain vLLM's; 0: no hybrid.
        window: Their window in tokens; 0 without any.

    """

    compressed: int
    full_groups: int = 1
    window_groups: int = 0
    window: int = 0

    def window_group_blocks(self, block_size: int, tokens: int, in_flight: int) -> int:
        """Most blocks that a request's sliding-window groups hold at one time.

        Args:
            block_size: Tokens per block.
            tokens: Most tokens of the request.
            in_flight: Most of them that are scheduled and not processed.

        """
        whole = cdiv(tokens, block_size)
        # The window's first token may be anywhere in its block.
        seen = cdiv(self.window - 1 + in_flight, block_size) + 1
        return self.window_groups * min(whole, seen)

    def pages_of_block(self, total: int) -> int:
        """Layers of the largest group: as many pages as a block has, in whatever group it is.

        Args:
            total: Layers of the model.

        """
        full = cdiv(self.compressed, self.full_groups)
        beside = cdiv(total - self.compressed, self.window_groups) if self.window_groups else 0
        return max(full, beside)


def _is_local(kind: str) -> bool:
    return kind == "sliding_attention"


def group_layers(types: Sequence[str], total: int, window: int | None) -> LayerGroups:
    """Group layers as vLLM does (_get_kv_cache_groups_uniform_page_size of kv_cache_utils.py).

    Args:
        types: The configuration's ``layer_types``; empty where it has none.
        total: Layers of the model.
        window: Tokens that a sliding-window layer attends to; None or 0: windows are switched off.

    """
    local = sum(_is_local(kind) for kind in types)
    full = total - local
    if not local or not window or full <= 0:
        return LayerGroups(total)
    fewest, most = sorted((full, local))
    size = most if most < fewest * _CROWDED else fewest
    return LayerGroups(full, cdiv(full, size), cdiv(local, size), int(window))


def compressed_numbers(types: Sequence[str], layers: LayerGroups) -> tuple[int, ...]:
    """Numbers of the layers that are compressed, in the model's order; empty: all of them.

    Args:
        types: As for :func:`group_layers`.
        layers: What it returned.

    """
    if not layers.window_groups:
        return ()
    return tuple(number for number, kind in enumerate(types) if not _is_local(kind))

"""Which layers of a model are compressed and how vLLM groups the others, from their types alone.

Scheduler, worker, front end and ``kvcompress plan`` all plan before the layers exist, and must use
the same groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.paging.rounding import cdiv

_CROWDED = 1.5
"""Ratio of the two kinds of layers below which the more frequent kind sets the group size."""


@dataclass(frozen=True)
class LayerGroups:
    """The layers of a model.

    Attributes:
        compressed: Number of layers that attend to the whole context.
        full_groups: Number of KV-cache groups that vLLM makes of these layers.
        window_groups: Number of KV-cache groups of sliding-window layers, which plain vLLM manages;
            0: the model has none.
        window: Tokens that a sliding-window layer attends to; 0: there is no such layer.

    """

    compressed: int
    full_groups: int = 1
    window_groups: int = 0
    window: int = 0

    def window_group_blocks(self, block_size: int, tokens: int, in_flight: int) -> int:
        """Largest number of blocks that a request holds at one time in all sliding-window groups.

        Args:
            block_size: Tokens per block.
            tokens: Largest number of tokens of the request.
            in_flight: Largest number of tokens that are scheduled and not yet processed.

        """
        whole = cdiv(tokens, block_size)
        # The window's first token may be anywhere in its block.
        seen = cdiv(self.window - 1 + in_flight, block_size) + 1
        return self.window_groups * min(whole, seen)

    def pages_of_block(self, total: int) -> int:
        """Number of pages in a block, which is the number of layers of the largest group.

        Args:
            total: Number of layers of the model.

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
        total: Number of layers of the model.
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
    """Return the numbers of the compressed layers, ascending; empty: all layers are compressed.

    Args:
        types: As for :func:`group_layers`.
        layers: What it returned.

    """
    if not layers.window_groups:
        return ()
    return tuple(number for number, kind in enumerate(types) if not _is_local(kind))

"""Prompt tokens that a request wants kept whatever a method thinks of them.

They are chosen first in every layer and head. How many tokens a layer keeps is decided as if they
were any others, except that no layer is given too little room for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_kvcompress.planning.pinned_ranges import Ranges, count_before, ids_between


@dataclass
class PinnedTokens:
    """Where a request's kept tokens lie in the storage of its layers.

    Attributes:
        ranges: What is to be kept, in positions of the text.
        since: Position of the last cut; tokens from there on lie one after another.
        places: Per layer, int64 [N, K], where those before it lie; empty before the first cut.

    """

    ranges: Ranges
    since: int = 0
    places: list[Tensor] = field(default_factory=list)

    def count(self, position: int) -> int:
        """How many tokens before a position have to be kept."""
        return count_before(self.ranges, position)

    def find(self, layer: int, position: int, held: int, heads: int) -> Tensor:
        """Return where a layer's kept tokens lie now, int64 [N, K].

        Args:
            layer: Index in the arena.
            position: Of the cut that is to be made.
            held: Tokens that the layer holds.
            heads: KV heads N.

        """
        fresh = ids_between(self.ranges, self.since, position) - position + held
        fresh = fresh.expand(heads, -1)
        return torch.cat([self.places[layer], fresh], dim=1) if self.places else fresh

    def follow(
        self, position: int, places: Sequence[Tensor], stored: Sequence[Tensor], held: Sequence[int]
    ) -> None:
        """Note where the kept tokens went in a cut. Mutates the record.

        Args:
            position: Of the cut.
            places: Per layer where they were, from :meth:`find`.
            stored: Per layer, int [N, T], what lies now where: places before the cut.
            held: Per layer the tokens it held before.

        """
        moved = []
        for old, kept, count in zip(places, stored, held, strict=True):
            kept = kept.to("cpu", torch.int64)
            new = torch.full((len(kept), count), -1, dtype=torch.int64)
            new.scatter_(1, kept, torch.arange(kept.shape[1]).expand(len(kept), -1))
            moved.append(new.gather(1, old))
        if any(bool((layer < 0).any()) for layer in moved):
            raise RuntimeError("a token that was to be kept has been evicted")
        self.places = moved
        self.since = position


def rank_first(worth: Tensor, places: Tensor) -> Tensor:
    """Return scores under which some tokens are chosen before all others.

    Args:
        worth: fp32 [N, S'], scores of the history.
        places: int64 [N, K], tokens by their place; those beyond the history are protected anyway.

    """
    history = worth.shape[1]
    places = places.to(worth.device)
    room = max(int(places.max()) + 1 - history, 0) if places.numel() else 0
    wide = torch.cat([worth, worth.new_zeros(len(worth), room)], dim=1)
    wide.scatter_(1, places, torch.inf)
    return wide[:, :history].contiguous()

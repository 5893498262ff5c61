"""Prompt tokens that must stay in every layer and head, whatever their scores: pinned tokens.

A request names some. While it generates, all that is left of its prompt may be pinned as well.
They are chosen before all others. How many tokens a layer keeps is decided as if they were any
others, except that every layer has room for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_kvcompress.planning.pinned_ranges import Ranges, ids_between

Places = Tensor | int
"""Places of tokens in one layer's storage, int64 [N, K]; or a number: that many, the first ones."""


@dataclass(frozen=True)
class PinnedPlaces:
    """Where pinned tokens lie at a cut.

    Attributes:
        places: Those of each layer.
        count: Tokens outside of the window that every layer must have room for, or each of them.

    """

    places: Sequence[Places]
    count: int | Sequence[int]


@dataclass
class PinnedTokens:
    """Where a request's pinned tokens lie in the storage of its layers, from cut to cut.

    Attributes:
        ranges: The pinned tokens, as positions of the text.
        since: Position of the last cut; tokens from there on lie one after another.
        places: Per layer, int64 [N, K], where those before it lie; empty before the first cut.

    """

    ranges: Ranges
    since: int = 0
    places: list[Tensor] = field(default_factory=list)

    def find(self, layer: int, position: int, held: int, heads: int) -> Tensor:
        """Return where a layer's pinned tokens lie now, int64 [N, K].

        Args:
            layer: Index in the arena.
            position: Position of the cut that is to be made.
            held: Tokens that the layer holds.
            heads: KV heads N.

        """
        fresh = ids_between(self.ranges, self.since, position) - position + held
        fresh = fresh.expand(heads, -1)
        return torch.cat([self.places[layer], fresh], dim=1) if self.places else fresh

    def follow(
        self, position: int, places: Sequence[Places], stored: Sequence[Tensor], held: Sequence[int]
    ) -> None:
        """Note where the pinned tokens went in a cut. Mutates the record.

        Args:
            position: Position of the cut.
            places: Per layer where they were, from :meth:`find`.
            stored: Per layer, int [N, T], what lies now where: places before the cut.
            held: Per layer the tokens it held before.

        """
        moved = []
        for old, kept, count in zip(places, stored, held, strict=True):
            assert isinstance(old, Tensor)  # it came from find
            kept = kept.to("cpu", torch.int64)
            new = torch.full((len(kept), count), -1, dtype=torch.int64)
            new.scatter_(1, kept, torch.arange(kept.shape[1]).expand(len(kept), -1))
            moved.append(new.gather(1, old))
        if any(bool((layer < 0).any()) for layer in moved):
            raise RuntimeError("a pinned token has been evicted")
        self.places = moved
        self.since = position


def rank_first(worth: Tensor, places: Places) -> Tensor:
    """Return scores under which some tokens are chosen before all others.

    Args:
        worth: fp32 [N, S'], scores of the history.
        places: Tokens by their place; those beyond the history are protected anyway.

    A score that is infinite or NaN counts as the largest finite one: none comes before a pinned
    token, whatever was not or could not be looked at before (on a GPU).

    """
    if isinstance(places, int):
        ranked = worth.nan_to_num(torch.finfo(worth.dtype).max).contiguous()
        ranked[:, :places] = torch.inf
        return ranked
    history = worth.shape[1]
    places = places.to(worth.device)
    room = max(int(places.max()) + 1 - history, 0) if places.numel() else 0
    wide = torch.cat([worth, worth.new_zeros(len(worth), room)], dim=1)
    wide.nan_to_num_(torch.finfo(wide.dtype).max)
    wide.scatter_(1, places, torch.inf)
    return wide[:, :history].contiguous()

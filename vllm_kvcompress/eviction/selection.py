"""From scores to what every layer keeps: how many pages, and which tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_kvcompress.eviction.layer_budgets import page_budgets
from vllm_kvcompress.eviction.pinned_tokens import rank_first
from vllm_kvcompress.methods import LayerScores, Method
from vllm_kvcompress.paging.arena import IntArray


@dataclass(frozen=True)
class PinnedPlaces:
    """Tokens that stay whatever their scores.

    Attributes:
        places: Per layer where they lie, int64 [N, K].
        count: Tokens outside of the window that every layer must have room for.

    """

    places: Sequence[Tensor]
    count: int


def select_survivors(
    method: Method,
    found: Sequence[LayerScores],
    *,
    capacity: int,
    block_size: int,
    lengths: Sequence[int],
    lap: Callable[[str], None],
    dealt: IntArray | None = None,
    pinned: PinnedPlaces | None = None,
) -> tuple[IntArray, list[Tensor]]:
    """Divide a request's pages between the layers, and choose the tokens of each.

    Args:
        method: The request's.
        found: Scores of all layers, their stats as numbers.
        capacity: Tokens that an average layer keeps, window included; whole pages.
        block_size: Tokens per page.
        lengths: Tokens that each layer holds now.
        lap: Told the name of each phase when it ends.
        dealt: Pages per layer, int64 [L], if they shall stay as they are.
        pinned: Tokens that must be among the chosen ones.

    Returns:
        Pages per layer, int64 [L], and per layer the places of its tokens, int [N, T_l], in the
        order in which they are to be stored.

    Raises:
        ValueError: As :func:`page_budgets`.

    """
    counts = dealt
    if counts is None:
        counts = page_budgets(
            method,
            found,
            pages_per_layer=capacity // block_size,
            block_size=block_size,
            lengths=lengths,
            pinned=pinned.count if pinned else 0,
        )
    lap("allocate")
    if pinned is not None:
        found = [
            replace(s, tokens=rank_first(s.tokens, places))
            for s, places in zip(found, pinned.places, strict=True)
        ]
    chosen = method.select_layers(found, (counts * block_size - method.window).tolist())
    if method.stores_by_worth:
        chosen = [by_worth(ids, s.tokens).flip(1) for ids, s in zip(chosen, found, strict=True)]
    kept = [
        with_window(ids, length, method.window) for ids, length in zip(chosen, lengths, strict=True)
    ]
    lap("select")
    return counts, kept


def with_window(history: Tensor, num_tokens: int, window: int) -> Tensor:
    """Append the last tokens to the chosen ones.

    Args:
        history: int [N, T], token ids below ``num_tokens - window``.
        num_tokens: Tokens that there are.
        window: Protected tokens at their end.

    Returns:
        int [N, T + window], same dtype and device, in the order given.

    """
    recent = torch.arange(
        num_tokens - window, num_tokens, dtype=history.dtype, device=history.device
    )
    return torch.cat([history, recent.expand(len(history), -1)], dim=1)


def by_worth(chosen: Tensor, worth: Tensor) -> Tensor:
    """Sort chosen tokens so that any number of the best ones stands at the end.

    Args:
        chosen: int [N, T], token ids, ascending.
        worth: fp32 [N, S'], of every token.

    Returns:
        [N, T], same dtype: ascending worth; among equals the lower id counts as better.

    """
    values = worth.gather(1, chosen.to(torch.int64))
    best_first = values.argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, best_first).flip(1)

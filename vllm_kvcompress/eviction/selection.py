"""From scores to what every layer keeps: how many pages, and which tokens in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from kvcompress_kernels.selection_torch import worst_first
from vllm_kvcompress.eviction.apportionment import Floats
from vllm_kvcompress.eviction.layer_budgets import page_division
from vllm_kvcompress.eviction.pinned_tokens import PinnedPlaces, Places, rank_first
from vllm_kvcompress.methods import LayerScores, Method, MethodError
from vllm_kvcompress.methods.faults import check_choice, method_code
from vllm_kvcompress.paging.arena import IntArray


class Order(Enum):
    """Order in which the survivors of the history are stored; the window always follows them."""

    TEXT = auto()
    """Ascending token number."""
    BEST_FIRST = auto()
    """Descending score; among equals the lower token number first."""
    WORST_FIRST = auto()
    """The reverse, so that the first pages are the first to be given up."""


@dataclass(frozen=True)
class Selection:
    """What a cut keeps.

    Attributes:
        pages: Pages per layer, int64 [L].
        tokens: Per layer the places of its tokens, int [N, T_l], in storage order.
        weights: The allocator's weights of the layers, fp64 [L]; None if the pages were given.

    """

    pages: IntArray
    tokens: list[Tensor]
    weights: Floats | None


def select_survivors(
    method: Method,
    scores: Sequence[LayerScores],
    *,
    capacity: int,
    block_size: int,
    lengths: Sequence[int],
    lap: Callable[[str], None],
    pages: IntArray | None = None,
    pinned: PinnedPlaces | None = None,
) -> Selection:
    """Divide a request's pages between the layers, and choose the tokens of each.

    Args:
        method: The request's.
        scores: Scores of all layers, their stats as numbers.
        capacity: Tokens that an average layer keeps, window included; whole pages.
        block_size: Tokens per page.
        lengths: Tokens that each layer holds now.
        lap: Told the name of each phase when it ends.
        pages: Pages per layer, int64 [L], if they shall stay as they are.
        pinned: Tokens that must be among the chosen ones.

    Raises:
        ValueError: As :func:`.layer_budgets.page_division`.
        MethodError: The method has failed.

    """
    weights = None
    if pages is None:
        division = page_division(
            method,
            num_layers=len(scores),
            pages_per_layer=capacity // block_size,
            block_size=block_size,
            lengths=lengths,
            pinned=pinned.count if pinned else 0,
        )
        pages, weights = division.divide_all(scores), division.weights
    lap("allocate")
    tokens = tokens_to_keep(
        method,
        scores,
        pages,
        block_size=block_size,
        lengths=lengths,
        order=Order.BEST_FIRST if method.scorer.stores_by_worth else Order.TEXT,
        pinned=pinned.places if pinned else None,
    )
    lap("select")
    return Selection(pages, tokens, weights)


def tokens_to_keep(
    method: Method,
    scores: Sequence[LayerScores],
    pages: Sequence[int] | IntArray,
    *,
    block_size: int,
    lengths: Sequence[int],
    order: Order,
    pinned: Sequence[Places] | None = None,
) -> list[Tensor]:
    """Choose the tokens that fill some layers' pages; the window is always among them.

    Args:
        method: Chooses by the scores.
        scores: Scores of the layers.
        pages: Pages of each.
        block_size: Tokens per page.
        lengths: Tokens that each layer holds now.
        order: Storage order of the history.
        pinned: Per layer the places of tokens that must be chosen.

    Returns:
        Per layer int [N, pages * block_size], places of tokens in storage order.

    Raises:
        MethodError: The method has failed.

    """
    if pinned is not None:
        scores = [
            replace(s, tokens=rank_first(s.tokens, places))
            for s, places in zip(scores, pinned, strict=True)
        ]
    counts = (np.asarray(pages) * block_size - method.window).tolist()
    worth = [s.tokens for s in scores]
    with method_code(method.name, "selecting tokens"):
        chosen = method.scorer.select_layers(worth, counts)
        if method.scorer.selects_itself:
            check_choice(method.name, worth, chosen, counts)
            if pinned is not None:
                _check_pinned(method, chosen, pinned, [own.shape[1] for own in worth])
    if order is not Order.TEXT:
        chosen = [by_worth(ids, s.tokens) for ids, s in zip(chosen, scores, strict=True)]
    if order is Order.BEST_FIRST:
        chosen = [ids.flip(1) for ids in chosen]
    return [
        with_window(ids, length, method.window) for ids, length in zip(chosen, lengths, strict=True)
    ]


def _check_pinned(
    method: Method, chosen: Sequence[Tensor], pinned: Sequence[Places], histories: Sequence[int]
) -> None:
    """MethodError if a scorer's own rule has left out tokens that are pinned."""
    for ids, where, history in zip(chosen, pinned, histories, strict=True):
        places = where
        if isinstance(places, int):
            places = torch.arange(places).expand(len(ids), -1)
        has = torch.zeros(len(places), history, dtype=torch.bool)
        has.scatter_(1, ids.to("cpu", torch.int64), True)
        # Those in the window are kept anyway.
        if not bool((has.gather(1, places.clamp(max=history - 1)) | (places >= history)).all()):
            raise MethodError(
                f"{method.name}: select has left out pinned tokens, whose scores are infinite"
            )


def with_window(history: Tensor, num_tokens: int, window: int) -> Tensor:
    """Append the last tokens to the chosen ones.

    Args:
        history: int [N, T], token numbers below ``num_tokens - window``.
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
        chosen: int [N, T], token numbers, ascending.
        worth: Scores of all tokens, fp32 [N, S'].

    Returns:
        [N, T], same dtype: ascending score; among equals the lower number counts as better.

    """
    ids = chosen.to(torch.int64)
    return worst_first(ids, worth.gather(1, ids)).to(chosen.dtype)

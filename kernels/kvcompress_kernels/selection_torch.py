"""Selection in torch and NumPy: for the CPU, and the reference for the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def top(scores: Tensor, count: int) -> Tensor:
    """Return the best tokens of every head, on the CPU by NumPy, which is some thirty times faster.

    Args:
        scores: [N, S'].
        count: 0 <= count <= S'.

    Returns:
        int64 [N, count], as of :func:`~kvcompress_kernels.selection.top_tokens`.

    """
    heads, tokens = scores.shape
    if count == 0:
        return torch.empty(heads, 0, dtype=torch.int64, device=scores.device)
    if count == tokens:
        return torch.arange(tokens, device=scores.device).repeat(heads, 1)
    if scores.device.type == "cpu":
        return torch.from_numpy(_top_numpy(as_numpy(scores), count))
    return _top_sorted(scores, count)


def _top_sorted(scores: Tensor, count: int) -> Tensor:
    """As :func:`top`, on any device."""
    ranked = torch.sort(_ordered_bits(scores), dim=-1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=-1).values


def as_numpy(scores: Tensor) -> npt.NDArray[Any]:
    scores = scores.detach()
    return (scores.float() if scores.dtype in _HALF else scores).numpy()


def _top_numpy(scores: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """As :func:`top`, for 0 < count < S'. NumPy puts NaN last, that is on top, as torch does."""
    heads, tokens = scores.shape
    split = tokens - count
    threshold = np.partition(scores, split, axis=1)[:, split : split + 1]
    chosen = np.less(scores, threshold)
    # Not >=, which would miss NaN. Every row has at least ``count`` of these.
    ids = np.flatnonzero(np.logical_not(chosen, out=chosen))
    if ids.size == heads * count:
        return ids.reshape(heads, count) - np.arange(heads, dtype=np.int64)[:, None] * tokens
    kept = np.empty((heads, count), dtype=np.int64)
    for row, limit, out in zip(scores, threshold[:, 0], kept, strict=True):
        above, tied = _above_and_tied(row, limit)
        first = np.flatnonzero(above)
        out[: first.size] = first
        out[first.size :] = np.flatnonzero(tied)[: count - first.size]
        out.sort()
    return kept


def _above_and_tied(
    scores: npt.NDArray[Any], limit: Any
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which scores rank above a limit and which equal it; NaNs are equal and on top."""
    if np.isnan(limit):
        return np.zeros(scores.shape, dtype=np.bool_), np.isnan(scores)
    return np.logical_not(scores <= limit), scores == limit


def worst_first(ids: Tensor, worth: Tensor) -> Tensor:
    """Sort tokens by worth; among equals the lower id is worth more, and NaN is worth most.

    On the CPU one sort of integers, which NumPy does some ten times faster than a stable one.

    Args:
        ids: int64 [N, T], ascending token ids below 2 ** 31.
        worth: Their worth, fp32 [N, T].

    Returns:
        int64 [N, T], the same ids.

    """
    if worth.device.type != "cpu":
        best_first = worth.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, best_first).flip(1)
    ranks = (_ordered_bits(worth).to(torch.int64) << 32).sub_(ids).numpy()
    ranks.sort(axis=1)
    return torch.from_numpy(-ranks & 0xFFFFFFFF)


def winners_numpy(scores: Sequence[npt.NDArray[Any]], k: int) -> npt.NDArray[np.int64]:
    every = np.concatenate(scores)
    split = every.size - k
    every.partition(split)
    parts = [_above_and_tied(layer, every[split]) for layer in scores]
    above = np.array([np.count_nonzero(part) for part, _ in parts], dtype=np.int64)
    ties = np.array([np.count_nonzero(part) for _, part in parts], dtype=np.int64)
    # Ties go to the layers in order.
    before = np.cumsum(ties) - ties
    result: npt.NDArray[np.int64] = above + np.clip(k - above.sum() - before, 0, ties)
    return result


def winners_torch(scores: Sequence[Tensor], k: int) -> npt.NDArray[np.int64]:
    """Count the winners on any device, by one stable sort of all entries."""
    keys = torch.cat([_ordered_bits(layer).flatten() for layer in scores])
    winners = torch.sort(keys, descending=True, stable=True).indices[:k].cpu().numpy()
    ends = np.cumsum([layer.numel() for layer in scores])
    owner = np.searchsorted(ends, winners, side="right")
    return np.bincount(owner, minlength=len(scores)).astype(np.int64)


def _ordered_bits(scores: Tensor) -> Tensor:
    """Map fp32 to int32 so that order is kept.

    Equal numbers stay equal (-0.0 and 0.0 are), and every NaN becomes the largest integer.
    """
    bits = scores.detach().float().contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return keys.masked_fill_(magnitude > 0x7F800000, 0x7FFFFFFF)

"""Which layers hold the best entries: what DynamicKV divides a pool by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton
from kvcompress_kernels.selection_torch import as_numpy, winners_numpy, winners_torch

LEAST_BACKGROUND = 1e-6
"""Of a row's mean magnitude: a background below it says that most entries are nothing."""


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers among which the best entries are counted.

    Attributes:
        first: The first layer's place among all.
        stop: The place behind the last one's.
        winners: How many entries win.

    """

    first: int
    stop: int
    winners: int


def winners_per_layer(
    scores: Sequence[Tensor], k: int, implementation: Implementation = "auto"
) -> npt.NDArray[np.int64]:
    """Return how many of the best entries over all layers each layer has.

    Of equal scores the lower (layer, head, token) wins, and NaN ranks above everything. On a GPU
    the k-th largest value is found digit by digit from histograms that stay there: scores are
    neither concatenated nor sorted, and the host waits for the device once, for the result. That
    works for fewer than 2 ** 31 entries.

    Source: DynamicKV, per-layer counts of a global top-k (arXiv 2412.14838, equations 4 and 5).

    Args:
        scores: One tensor [heads, S'] per layer, fp32 (others are converted), all on one device;
            lengths may differ.
        k: How many entries win.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Returns:
        int64 [len(scores)] that sums to min(k, number of entries).

    Raises:
        ValueError: k is negative.

    """
    stages = [Stage(0, len(scores), k)]
    return winners_by_stage(scores, stages, implementation=implementation)[0]


def winners_by_stage(
    scores: Sequence[Tensor],
    stages: Sequence[Stage],
    *,
    background: float | None = None,
    implementation: Implementation = "auto",
) -> list[npt.NDArray[np.int64]]:
    """Return :func:`winners_per_layer` of several choices of layers, each layer read once for all.

    On a GPU the host waits for the device once.

    Args:
        scores: As there, of every layer that is in a stage.
        stages: Which layers are compared, and how many entries win.
        background: If given, an entry counts by :func:`out_of_background` with this share.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Returns:
        Per stage int64 [layers of it] that sums to min(winners, number of entries).

    Raises:
        ValueError: A number of winners is negative.

    """
    found: list[npt.NDArray[np.int64] | None] = []
    sizes = np.array([layer.numel() for layer in scores], dtype=np.int64)
    for stage in stages:
        own = sizes[stage.first : stage.stop]
        if stage.winners < 0:
            raise ValueError(f"the number of winners must not be negative, got {stage.winners}")
        whole = own if stage.winners >= own.sum() else np.zeros_like(own)
        found.append(whole if stage.winners >= own.sum() or stage.winners == 0 else None)
    open_stages = [stage for stage, done in zip(stages, found, strict=True) if done is None]
    if open_stages:
        if use_triton(scores[0], implementation):
            counts = iter(_count_on_device(scores, open_stages, background))
        else:
            seen = scores
            if background is not None:
                seen = [out_of_background(layer, background) for layer in scores]
            counts = iter([_count(seen[s.first : s.stop], s.winners) for s in open_stages])
        found = [next(counts) if done is None else done for done in found]
    return [done for done in found if done is not None]


def out_of_background(scores: Tensor, share: float) -> Tensor:
    """Return how far each of [N, S'] is above the background of its row, in backgrounds; fp32.

    The background is the entry that a share of the row's entries does not exceed. Rows keep their
    order whatever the sign of their scores.
    """
    scores = scores.float()
    rank = math.ceil(share * scores.shape[1])
    background = scores.kthvalue(rank, dim=1, keepdim=True).values
    least = LEAST_BACKGROUND * scores.abs().mean(dim=1, keepdim=True)
    unit = torch.maximum(background.abs(), least).clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores - background) / unit


def _count(scores: Sequence[Tensor], k: int) -> npt.NDArray[np.int64]:
    if scores[0].device.type == "cpu":
        return winners_numpy([as_numpy(layer.float()).ravel() for layer in scores], k)
    return winners_torch(scores, k)


def _count_on_device(
    scores: Sequence[Tensor], stages: Sequence[Stage], background: float | None
) -> list[npt.NDArray[np.int64]]:
    ranges = [(stage.first, stage.stop, stage.winners) for stage in stages]
    counts = triton_kernels("winners").winners_by_stage(
        scores, ranges, background, LEAST_BACKGROUND
    )
    ends = np.cumsum([stop - first for first, stop, _ in ranges])
    return np.split(counts.cpu().numpy(), ends[:-1])

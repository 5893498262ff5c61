"""Means with 95 % confidence intervals; the same values give the same interval every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval of level :data:`LEVEL`.
        high: Upper end of the interval.
        n: Number of prompts, or of pairs of prompts.

    """

    value: float
    low: float
    high: float
    n: int


@lru_cache
def wilson(right: int, n: int) -> Estimate:
    """Share of ``right`` answers among ``n`` with Wilson's score interval.

    Unlike the normal interval it has a width where all answers are right.
    """
    low, high = binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(right / n, float(low), float(high), n)


def mean_score(strata: Sequence[Sequence[float] | Floats]) -> Estimate:
    """Mean of the strata's means of scores from 0 to 1.

    One stratum of zeros and ones has Wilson's interval, everything else a bootstrap over the
    prompts of each stratum. A bootstrap of equal scores has no width; where a task's scores are all
    0 or all 1 its Wilson interval is added as an independent error, as in Zou and Donner's MOVER
    (Stat. Med. 27, 2008).

    Args:
        strata: Scores of the prompts of each task; no task without a prompt.

    """
    if len(strata) == 1 and np.isin(strata[0], (0.0, 1.0)).all():
        return wilson(int(sum(strata[0])), len(strata[0]))
    return _stratified(strata, _unseen_score, (0.0, 1.0))


def mean_difference(strata: Sequence[Sequence[float] | Floats], *, scores: bool) -> Estimate:
    """Mean of the strata's means of differences between pairs.

    The interval is a bootstrap over the pairs of each stratum. Where all pairs of a task differ
    alike, most often not at all, as many may differ otherwise as Wilson's interval of none among
    the task's pairs allows.

    Args:
        strata: Differences of the pairs of each task; no task without a pair.
        scores: Whether they are between scores from 0 to 1, so that no pair can differ by more than
            1; else an interval without width stays one.

    """
    if scores:
        return _stratified(strata, _unseen_difference, (-1.0, 1.0))
    return mean_of(strata)


def mean_of(strata: Sequence[Sequence[float] | Floats]) -> Estimate:
    """Mean of the strata's means of any values, with a bootstrap over each stratum."""
    return _stratified(strata, _nothing_unseen, (-np.inf, np.inf))


def _stratified(
    strata: Sequence[Sequence[float] | Floats],
    unseen: Callable[[float, int], tuple[float, float]],
    limits: tuple[float, float],
) -> Estimate:
    means, below, above = [], 0.0, 0.0
    sums = np.zeros(RESAMPLES)
    for number, values in enumerate(strata):
        array = np.asarray(values, dtype=np.float64)
        means.append(float(array.mean()))
        if array.min() < array.max():
            sums += array[_draws(len(array), number)].mean(axis=1)
        else:
            sums += array[0]
            low, high = unseen(float(array[0]), len(array))
            below += ((array[0] - low) / len(strata)) ** 2
            above += ((high - array[0]) / len(strata)) ** 2
    value = sum(means) / len(means)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(sums / len(strata), (tail, 1 - tail))
    low = value - sqrt(max(0.0, value - low) ** 2 + below)
    high = value + sqrt(max(0.0, high - value) ** 2 + above)
    n = sum(map(len, strata))
    return Estimate(value, float(max(low, limits[0])), float(min(high, limits[1])), n)


@lru_cache(maxsize=64)
def _draws(n: int, stratum: int) -> npt.NDArray[np.int64]:
    """Indices of the values in each resample, int64 [RESAMPLES, n]; another draw per stratum."""
    return np.random.default_rng((SEED, stratum)).integers(n, size=(RESAMPLES, n))


def _unseen_score(value: float, n: int) -> tuple[float, float]:
    if value not in (0.0, 1.0):
        return value, value
    estimate = wilson(int(value) * n, n)
    return estimate.low, estimate.high


def _unseen_difference(value: float, n: int) -> tuple[float, float]:
    most = wilson(0, n).high
    return value - most, value + most


def _nothing_unseen(value: float, _n: int) -> tuple[float, float]:
    return value, value

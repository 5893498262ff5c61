"""Figures of two engines that took turns, and what follows from them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Paired:
    """One figure of each engine in each round.

    Attributes:
        plain: Figures of plain vLLM by round, above 0.
        compressed: Figures of the engine with compression by round, above 0.
        more_is_better: Whether the figures are rates; otherwise they are times.

    """

    plain: tuple[float, ...]
    compressed: tuple[float, ...]
    more_is_better: bool = False

    def __post_init__(self) -> None:
        if not self.plain or len(self.plain) != len(self.compressed):
            raise ValueError(
                "both engines must have a figure for each of one or more rounds, got "
                f"{len(self.plain)} and {len(self.compressed)}"
            )

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as fast the compressed engine was, by round."""
        pairs = zip(self.plain, self.compressed, strict=True)
        return tuple(c / p if self.more_is_better else p / c for p, c in pairs)

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios; a change in the machine's speed hardly affects it."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a round."""
        return min(self.ratios), max(self.ratios)

    @property
    def medians(self) -> tuple[float, float]:
        """The median of each engine."""
        return statistics.median(self.plain), statistics.median(self.compressed)

    @property
    def pays(self) -> bool:
        """Whether compression was faster in every one of several rounds."""
        return len(self.plain) > 1 and self.spread[0] > 1

    @property
    def verdict(self) -> str:
        """Whether compression pays here, in words; one round never shows that it does."""
        low, high = self.spread
        if len(self.plain) == 1:
            return "one round says little" if high > 1 else "does not pay (one round)"
        if high <= 1:
            return "does not pay"
        return "pays" if low > 1 else "no clear gain"


def take_turns(
    rounds: int,
    plain: Callable[[], T],
    compressed: Callable[[], T],
    tell: Callable[[int], object] = lambda _: None,
) -> list[tuple[T, T]]:
    """Call both once a round; the order changes, because the second may find warmer caches.

    Args:
        rounds: Number of rounds.
        plain: Measures plain vLLM.
        compressed: Measures the other engine.
        tell: Called with the number of each round, from 1, before it begins.

    Returns:
        What they returned, plain first, by round.

    """
    pairs = []
    for number in range(1, rounds + 1):
        tell(number)
        if number % 2:
            pairs.append((plain(), compressed()))
        else:
            second = compressed()
            pairs.append((plain(), second))
    return pairs

"""Figures of two engines that took turns, and what follows from them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E")


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
    rounds: int, engines: tuple[E, E], run: Callable[[E], T], tell: Callable[[str], object]
) -> list[tuple[T, T]]:
    """Run both once a round; the order changes, because the second may find warmer caches.

    Args:
        rounds: Number of rounds.
        engines: Plain vLLM's, and the compressed one.
        run: Measures one of them.
        tell: Called with a line of progress before each round.

    Returns:
        What ``run`` returned, plain first, by round.

    """
    plain, compressed = engines
    pairs = []
    for number in range(1, rounds + 1):
        tell(f"round {number} of {rounds}")
        if number % 2:
            pairs.append((run(plain), run(compressed)))
        else:
            second = run(compressed)
            pairs.append((run(plain), second))
    return pairs

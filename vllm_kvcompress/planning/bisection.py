"""Search for the largest number that still works."""

from bisect import bisect_left
from collections.abc import Callable


def largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number in a range for which a condition holds.

    Args:
        low: Returned if the condition holds for no number above it; it is not asked for this one.
        high: Largest number in question; below ``low``: there is nothing to search.
        holds: The condition. If it holds for a number, it must hold for all smaller ones.

    """
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda n: not holds(n))

"""How a kernel orders the elements of a page, and fetching many tokens at once from such pages.

Kernels store a token's elements in a regular way: side by side, or at equal distances, or with
those of the next token in between. What is known of that way decides how much one instruction can
move; without any, elements are fetched one by one.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by its bytes: not every float type can be gathered."""

_SHORTEST_LINE = 32
"""Bytes side by side that are worth copying as a row; the index of a row takes 8."""


class PageOrder:
    """The order of the elements in a page's keys, or in its values.

    Args:
        place: Where each token's elements lie, int64 [block_size, D], each place once.
        distance: The elements of every page and head begin at a multiple of so many.
        itemsize: Bytes of an element.

    """

    def __init__(self, place: Tensor, distance: int, itemsize: int) -> None:
        self._place = place
        self._first = place[:, 0].contiguous()
        self._offsets = place[0] - place[0, 0]
        self._distance = distance
        self._itemsize = itemsize
        alike = torch.equal(place, self._first[:, None] + self._offsets)
        self._levels = _levels(self._offsets.tolist()) if alike else []
        self._unit = 1
        self._fetch = self._fetch_elements
        if not self._levels:
            return
        count, step = self._levels[0]
        width = count * step
        if step <= 2 and width * itemsize >= _SHORTEST_LINE and self._divides(width, within=step):
            self._fetch = self._fetch_lines
            return
        self._fetch = self._fetch_windows
        if step == 1 and count * itemsize in INTEGERS and self._divides(count):
            self._unit = count
            del self._levels[0]

    def take(self, memory: Tensor, begin: Tensor, slots: Tensor) -> Tensor:
        """Fetch tokens.

        Args:
            memory: What places are counted in, one dimension, contiguous.
            begin: Where the elements of each token's page and head begin, int64 [...].
            slots: Its slot in the page, int64 [...].

        Returns:
            [..., D], contiguous, the type of ``memory``.

        """
        found = self._fetch(memory.view(INTEGERS[self._itemsize]), begin, slots)
        return found.view(memory.dtype).view(*slots.shape, len(self._offsets))

    def _fetch_elements(self, bits: Tensor, begin: Tensor, slots: Tensor) -> Tensor:
        return bits[begin.unsqueeze(-1) + self._place[slots]]

    def _fetch_windows(self, bits: Tensor, begin: Tensor, slots: Tensor) -> Tensor:
        """Look at the memory as overlapping tokens, one for each place where one could begin."""
        unit = self._unit
        shape = [count for count, _ in reversed(self._levels)]
        strides = [step // unit for _, step in reversed(self._levels)]
        units = bits.view(INTEGERS[unit * self._itemsize])
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        windows = units.as_strided((len(units) - reach, *shape), (1, *strides))
        first = begin + self._first[slots]
        return windows[first.div_(unit, rounding_mode="floor")].view(bits.dtype)

    def _fetch_lines(self, bits: Tensor, begin: Tensor, slots: Tensor) -> Tensor:
        """Copy whole lines; where two tokens share them, pick one's elements out afterwards."""
        count, step = self._levels[0]
        first = begin + self._first[slots]
        lines = first.unsqueeze(-1) + self._offsets[::count]
        lines = lines.div_(count * step, rounding_mode="floor").flatten()
        words = bits.view(INTEGERS[step * self._itemsize]).view(-1, count)
        rows = words.index_select(0, lines)
        if step == 1:
            return rows
        shift = (first % step).mul_(8 * self._itemsize).to(rows.dtype)
        rows = rows.view(*first.shape, -1)
        return rows.bitwise_right_shift_(shift.unsqueeze(-1)).to(bits.dtype)

    def _divides(self, unit: int, within: int = 1) -> bool:
        """Whether all that is fetched begins at a multiple of so many, less its place within it."""
        starts = self._first - self._first % within
        steps = [step for _, step in self._levels[1:]]
        return math.gcd(self._distance, *starts.tolist(), *steps) % unit == 0


def _levels(offsets: list[int]) -> list[tuple[int, int]]:
    """Factor offsets that begin at 0 into nested steps, the innermost first.

    Returns:
        (count, step) of each level, so that the offsets are all sums of one multiple below count of
        each step, in order; empty if they are not regular.

    """
    levels: list[tuple[int, int]] = []
    while len(offsets) > 1:
        step = offsets[1]
        steps = [b - a for a, b in pairwise(offsets)]
        count = next((i + 1 for i, s in enumerate(steps) if s != step), len(offsets))
        heads = offsets[::count]
        regular = [h + i * step for h in heads for i in range(count)]
        if step < 1 or regular != offsets:
            return []
        levels.append((count, step))
        offsets = heads
    return levels or [(1, 1)]

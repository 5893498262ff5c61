"""Ranges of prompt tokens that a request wants kept."""

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of token positions, ascending, apart from each other."""


def parse_ranges(value: object, prompt_len: int) -> Ranges:
    """Read ranges of a prompt's tokens.

    Args:
        value: Pairs [start, end), or the same numbers in one flat list.
        prompt_len: Prompt tokens.

    Returns:
        The same tokens in ascending ranges that do not touch.

    Raises:
        ValueError: What is wrong with them, to follow the setting's name.

    """
    flat: list[object] = []
    for item in value if isinstance(value, list | tuple) else [None]:
        flat += item if isinstance(item, list | tuple) else [item]
    numbers = [n for n in flat if isinstance(n, int) and not isinstance(n, bool)]
    if len(numbers) != len(flat) or len(flat) % 2:
        raise ValueError(
            "must be start and end of one or more ranges of prompt tokens, such as [0, 120, 300, "
            f"350], got {shown(value)}"
        )
    ranges = sorted(zip(numbers[::2], numbers[1::2], strict=True))
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if not 0 <= start < end <= prompt_len:
            raise ValueError(
                f"has the range {start} to {end}, but ranges must lie within the prompt's "
                f"{prompt_len} tokens and hold at least one"
            )
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def shown(value: object, most: int = 80) -> str:
    """Return a value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def count_before(ranges: Ranges, end: int) -> int:
    """How many tokens of the ranges come before a position."""
    return sum(max(min(stop, end) - start, 0) for start, stop in ranges)


def ids_between(ranges: Ranges, first: int, end: int) -> Tensor:
    """Tokens of the ranges from one position up to another, int64, ascending."""
    parts = [
        torch.arange(max(start, first), min(stop, end))
        for start, stop in ranges
        if max(start, first) < min(stop, end)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

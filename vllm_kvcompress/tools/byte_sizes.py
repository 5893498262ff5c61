"""Sizes of memory as people write them."""

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(text: str) -> int:
    """Read a size such as ``12GiB``, ``800 MiB``, ``1.5GB`` or plain bytes.

    Raises:
        ValueError: Not a number with one of the units, or less than one byte.

    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = int(Decimal(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(
            f"a size must be a number of bytes above 0, or one with a unit such as 800MiB, 12GiB "
            f"or 80GB, got {text!r}"
        )
    return size


def format_bytes(size: int) -> str:
    """Write a size with three significant digits or more, in binary units."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            value = size / scale
            return f"{value:.0f} {unit}" if value >= 1000 else f"{value:.2f} {unit}"
    return f"{size} B"

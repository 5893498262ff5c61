"""Checks of parameters: ValueError, with what is allowed and what was given.

A part calls them in ``__post_init__``; :class:`~vllm_kvcompress.methods.method.MethodSpec` puts
the method's name in front of the sentence.
"""

from collections.abc import Sequence
from typing import NoReturn

LEAST_NUMBER, MOST_NUMBER = 1e-6, 2**31 - 1
"""Size of numbers but 0 that a parameter takes: what tensors and fp32 can do with them."""

MOST_WIDTH = 4095
"""Largest width of a pooling: memory and time of it grow with the width."""


def check_int(name: str, value: object, least: int) -> None:
    """Accept an integer of at least ``least`` and at most :data:`MOST_NUMBER`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _refuse(name, value, f"an integer of at least {least}")
    if value > MOST_NUMBER:
        _refuse(name, value, f"at most {MOST_NUMBER}")


def check_odd(name: str, value: object) -> None:
    """Accept a positive odd integer of at most :data:`MOST_WIDTH`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        _refuse(name, value, "an odd integer of at least 1")
    if value > MOST_WIDTH:
        _refuse(name, value, f"at most {MOST_WIDTH}")


def check_number(
    name: str, value: object, least: float, *, above: bool = False, optional: bool = False
) -> None:
    """Accept a number of at least ``least``; 0, or in size LEAST_NUMBER to MOST_NUMBER.

    Args:
        name: Of the parameter.
        value: Of the parameter.
        least: The bound.
        above: Whether the number must be greater than the bound.
        optional: Whether None is accepted too.

    """
    if optional and value is None:
        return
    expected = f"a number {'above' if above else 'of at least'} {least:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, value, expected)
    if not (value > least if above else value >= least):
        _refuse(name, value, expected)
    if value != 0 and not LEAST_NUMBER <= abs(value) <= MOST_NUMBER:
        sizes = f"{LEAST_NUMBER:g} to {MOST_NUMBER} in size"
        _refuse(name, value, sizes if above else f"0 or {sizes}")


def check_share(name: str, value: object) -> None:
    """Accept a float above 0 and below 1."""
    if not (isinstance(value, float) and 0.0 < value < 1.0):
        _refuse(name, value, "a number above 0 and below 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Accept one of some words."""
    if value not in choices:
        _refuse(name, value, "one of " + ", ".join(choices))


def check_bool(name: str, value: object) -> None:
    """Accept True or False."""
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ValueError(f"{name} must be {expected}, got {value!r}")

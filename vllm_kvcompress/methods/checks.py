"""Checks of parameters: ValueError, with what is allowed and what was given.

A part calls them in ``__post_init__``; :class:`~vllm_kvcompress.methods.method.MethodSpec` puts
the method's name in front of the sentence.
"""

import sys
from collections.abc import Sequence


def check_int(name: str, value: object, least: int) -> None:
    """Accept an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _refuse(name, value, f"an integer of at least {least}")


def check_odd(name: str, value: object) -> None:
    """Accept a positive odd integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        _refuse(name, value, "an odd integer of at least 1")


def check_number(
    name: str, value: object, least: float, *, above: bool = False, optional: bool = False
) -> None:
    """Accept a finite number of at least ``least``.

    Args:
        name: Of the parameter.
        value: Of the parameter.
        least: The bound.
        above: Whether the number must be greater than the bound.
        optional: Whether None is accepted too.

    """
    if optional and value is None:
        return
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # not inf or nan, nor an integer beyond floats
        and (value > least if above else value >= least)
    )
    if not good:
        _refuse(name, value, f"a number {'above' if above else 'of at least'} {least:g}")


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


def _refuse(name: str, value: object, expected: str) -> None:
    raise ValueError(f"{name} must be {expected}, got {value!r}")

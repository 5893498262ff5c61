"""What sub-commands of ``kvcompress`` share: reading arguments, and errors that users can mend.

A sub-command is a package with a module ``command`` that has ``add_parser(subparsers)`` and
``run(args)``. It is imported whenever the command line is parsed, so what is slow to import (torch,
transformers, vLLM) is imported inside ``run``.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

STOPPED = 130
"""Exit status after an interrupt."""


class CommandError(Exception):
    """What a user can put right; its text is one sentence and all that the user is shown."""


def split(text: str) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, name: str, least: int = 0) -> list[int]:
    """Whole numbers between commas; CommandError if something else is there, or nothing."""
    try:
        values: Sequence[int] = [int(part) for part in split(text)]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise CommandError(f"--{name} must be whole numbers from {least} with commas, got {text!r}")
    return list(values)


def count(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """For argparse: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value

"""A deck from the faults of an earlier soak, to see whether they come again."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.soak.asks import Ask
from benchmarks.soak.traffic import Talk

Deal = Callable[[random.Random, int], list[Talk]]
"""Draws a round's talks, at most about so many."""


def read_deck(file: Path) -> Deal:
    """Return what deals the requests of a ``faults.jsonl``, all of them in each round.

    Args:
        file: Written by :class:`benchmarks.soak.books.Books`.

    """
    talks = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for found in row.get("crowd", ()) if "body" not in row else [row]:
            body = found["body"]
            ask = Ask(
                found["kind"],
                "chat" in found["path"],
                body,
                same_alone=body["temperature"] == 0 or "seed" in body,
                refused=found["kind"] == "refused",
            )
            talks[ask.key] = Talk(ask)
    if not talks:
        raise ValueError(f"{file} has no requests")
    return lambda dice, count: list(talks.values())

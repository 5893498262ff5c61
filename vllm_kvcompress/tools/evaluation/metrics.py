"""Scores of an answer, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        score: Function from an answer and its references to a score from 0 to 1.
        monotone: Whether more text can only raise it, so that an answer which has reached 1 need
            not be generated to its end.

    """

    score: Callable[[str, Sequence[str]], float]
    monotone: bool = False

    def settled(self, text: str, references: Sequence[str]) -> bool:
        """Whether no more text can change the score."""
        return self.monotone and self.score(text, references) == 1.0


def match_all(text: str, references: Sequence[str]) -> float:
    """RULER's string_match_all: share of the references in the text, whatever their case."""
    return sum(_found(text, references)) / len(references)


def match_part(text: str, references: Sequence[str]) -> float:
    """RULER's string_match_part: 1 if any of the references is in the text, whatever its case."""
    return float(any(_found(text, references)))


def _found(text: str, references: Sequence[str]) -> list[bool]:
    return [reference.lower() in text.lower() for reference in references]


METRICS: dict[str, Metric] = {
    "match_all": Metric(match_all, monotone=True),
    "match_part": Metric(match_part, monotone=True),
}
"""Metrics by name; tasks with their own metrics add them when they are imported."""

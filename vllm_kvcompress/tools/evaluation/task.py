"""Prompts with their references, and the tasks that make them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any


class EvaluationError(Exception):
    """An error that the user can correct; the user is shown its text, one sentence, and no more."""


@dataclass(frozen=True)
class Prompt:
    """One question about one context.

    Attributes:
        index: Number of the prompt among those of its task, length and seed.
        context: Text that is compressed in both protocols.
        question: Text between the context and the answer; may be empty.
        references: Right answers, or parts of it; the metric says which.
        max_tokens: Most tokens that the answer may have.
        metric: Name in ``metrics.METRICS``; empty where only the likelihood of ``measured`` is
            asked for.
        measured: A continuation whose likelihood is measured instead of an answer's score; None: an
            answer is generated.
        labels: Labels by which plots group prompts, such as the depth of a needle.
        opening: End of ``question`` with which the answer is begun for the model; may be empty.

    """

    index: int
    context: str
    question: str = ""
    references: tuple[str, ...] = ()
    max_tokens: int = 1
    metric: str = ""
    measured: str | None = None
    labels: Mapping[str, str | int | float] = field(default_factory=lambda: MappingProxyType({}))
    opening: str = ""

    @property
    def text(self) -> str:
        """Context and question."""
        return self.context + self.question


@dataclass(frozen=True)
class Source:
    """Model and data from which a task makes its prompts.

    Attributes:
        model: The model's folder or hub identifier, whose tokenizer counts.
        tokenizer: The tokenizer itself, an object of transformers.
        data: Folder of the data that needs one, such as the one scripts/fetch_ruler.py makes.
        cache: Folder where generated prompts may be kept between runs.

    """

    model: str
    tokenizer: Any
    data: Path
    cache: Path

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens included."""
        return len(self.tokenizer(text)["input_ids"])


class Task(ABC):
    """Makes prompts.

    Attributes:
        name: Name on the command line and in results, such as ``ruler/vt``.

    """

    name: str

    @abstractmethod
    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Make prompts; the same arguments make the same ones.

        Args:
            source: Data and tokenizer.
            length: Most tokens of context and question; what it means in detail is the task's.
            count: Number of prompts; a task that has fewer returns all it has.
            seed: Another one makes other prompts.

        Raises:
            EvaluationError: The data is not there, or no such prompt can be made.

        """

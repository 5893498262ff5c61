"""Likelihoods through the decode path: of a text's continuation, and of a task's right answers.

The compressed cache must be what is measured, so the tokens are forced one by one after the
compression. The first of them is predicted by the prefill, which still has the full cache, as is
the first token of every answer.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from functools import partial

from vllm_kvcompress.planning.bisection import largest
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task

PREFIX = "nll/"
"""Before a task's name: the likelihood of its right answer instead of the score of the model's."""

CONTINUATION_WORDS = 100
"""Words whose likelihood is measured after each piece of text."""

_WORDS_A_TOKEN = 1.5
"""More words than any tokenizer makes of a token, to cut a piece from."""


@dataclass(frozen=True)
class Perplexity(Task):
    """Continuations of pieces of a text: ``perplexity.txt`` in the data folder, or the essays."""

    name: str = "perplexity"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Cut pieces of at most ``length`` tokens out of the text, at random places.

        Raises:
            EvaluationError: There is no text, or it is shorter than a piece.

        """
        words = _text(source)
        rng = random.Random(seed)
        span = int(length * _WORDS_A_TOKEN)
        if len(words) < length + CONTINUATION_WORDS:
            raise EvaluationError(
                f"perplexity: a text of {len(words)} words is too short for {length} tokens"
            )
        pieces = []
        for index in range(count):
            start = rng.randrange(len(words) - length - CONTINUATION_WORDS + 1)
            piece = words[start : start + span]
            fitting = largest(0, len(piece), partial(_fits, source, piece, length))
            end = start + fitting
            pieces.append(
                Prompt(
                    index=index,
                    context=" ".join(words[start:end]),
                    measured=" " + " ".join(words[end : end + CONTINUATION_WORDS]),
                )
            )
        return pieces


@dataclass(frozen=True)
class AnswerLikelihood(Task):
    """The right answers of a task's prompts: all references, or the first where one is enough.

    Attributes:
        task: Task whose prompts are used.

    """

    task: Task

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's with ``nll/`` before it."""
        return f"{PREFIX}{self.task.name}"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """The task's prompts, each with its answer to be measured; those without are left out."""
        made = self.task.prompts(source, length=length, count=count, seed=seed)
        return [
            replace(p, measured=f" {_answer(p)}", metric="")
            for p in made
            if p.measured is None and p.references
        ]


def _answer(prompt: Prompt) -> str:
    metric = METRICS[prompt.metric]
    if metric is METRICS["match_all"]:
        return ", ".join(prompt.references)
    return prompt.references[0]


def _text(source: Source) -> list[str]:
    own = source.data / "perplexity.txt"
    essays = source.data / "ruler" / "PaulGrahamEssays.json"
    if own.is_file():
        text = own.read_text(encoding="utf-8")
    elif essays.is_file():
        text = json.loads(essays.read_text(encoding="utf-8"))["text"]
    else:
        raise EvaluationError(
            f"perplexity needs a text: put one at {own}, or run scripts/fetch_ruler.py"
        )
    return re.sub(r"\s+", " ", text).strip().split(" ")


def _fits(source: Source, words: list[str], length: int, count: int) -> bool:
    """Whether the first ``count`` words have at most ``length`` tokens."""
    return source.count(" ".join(words[:count])) <= length

"""The needle grid: one needle at every depth and length, for heat-maps.

RULER's wording of niah_single_2, but with the needle's depth given and the haystack as long as
fits, so that lengths are what they say. A prompt's depth is a label of its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task
from vllm_kvcompress.tools.evaluation.tasks import haystack

DEPTHS = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
"""Per cent of the haystack's sentences before the needle; prompts have them in turn."""

MAX_TOKENS = 32
QUESTION = "\nWhat is the special magic number"
OPENING = " The special magic number for"


@dataclass(frozen=True)
class NeedleGrid(Task):
    """The needle at each of :data:`DEPTHS` in turn."""

    name: str = "needle"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Make prompts of at most ``length`` tokens, the answer's not counted.

        Raises:
            EvaluationError: The essays are not there, or not even the question fits.

        """
        try:
            needles = haystack.niah_single_2(
                source.data / "ruler",
                source.count,
                length=length,
                count=count,
                seed=seed,
                depths=DEPTHS,
            )
        except FileNotFoundError as error:
            raise EvaluationError(
                f"the needle's haystack {error.filename} is not there: run scripts/fetch_ruler.py, "
                "or name with --data the folder that holds ruler/"
            ) from error
        except ValueError as error:
            raise EvaluationError(f"needle: {error}") from error
        return [_prompt(index, needle) for index, needle in enumerate(needles)]


def tasks() -> Mapping[str, Task]:
    """The one task by name."""
    return {"needle": NeedleGrid()}


def _prompt(index: int, needle: haystack.Needle) -> Prompt:
    cut = needle.prompt.rfind(QUESTION)
    return Prompt(
        index=index,
        context=needle.prompt[:cut],
        question=needle.prompt[cut:],
        opening=needle.prompt[needle.prompt.rfind(OPENING) :],
        references=needle.answers,
        max_tokens=MAX_TOKENS,
        metric="match_all",
        labels={"depth": needle.depth},
    )

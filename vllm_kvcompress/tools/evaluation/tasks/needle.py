"""One needle ("special magic number") in Paul Graham's essays, at a given length and depth.

Follows RULER's niah_single_2 (Hsieh et al., arXiv 2404.06654, github.com/NVIDIA/RULER, Apache-2.0,
as shipped in nvidia-long-context-eval 26.3: data/synthetic/niah.py, data/synthetic/constants.py,
synthetic.yaml and eval/synthetic/constants.py): template, answer prefix and needle in RULER's
words, "base" model template, key "adjective-noun", value of seven digits, depth from a grid of 40,
the same order of random draws and the same metric. It differs from RULER in three ways, all about
length and layout:

- `length` is the prompt's length. RULER counts 128 tokens to generate in, and grows the haystack
  in steps of 500 words, which at 1024 would give prompts of about 700 tokens; here the haystack is
  as many words as fit.
- The key, value and depth of prompt i do not depend on `length`.
- Sentences are split by a regular expression instead of NLTK's Punkt model, which is not in PyPI.
  That only decides between which words the needle may stand.

The task gives the depth, for heat maps; it is a label of a prompt's record.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvcompress.planning.bisection import largest
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task

# RULER's wording (data/synthetic/constants.py), in the form niah.py gives it for one number.
CONTEXT = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n{text}"
)
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
OPENING = " The special magic number for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
RULER_DEPTHS = [int(d) for d in np.round(np.linspace(0, 100, num=40, endpoint=True))]

DEPTHS = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
"""Per cent of the haystack's sentences before the needle; the task's prompts have them in turn."""

MAX_TOKENS = 32

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]* (?=[\"'(\[]?[A-Z0-9])")


@dataclass(frozen=True)
class NeedleGrid(Task):
    """The needle at each of :data:`DEPTHS` in turn."""

    name: str = "needle"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Make prompts of at most ``length`` tokens, the answer's not counted."""
        folder = source.data / "ruler"
        return niah_single_2(
            folder, source.count, length=length, count=count, seed=seed, depths=DEPTHS
        )


def niah_single_2(
    data: Path,
    count_tokens: Callable[[str], int],
    *,
    length: int,
    count: int,
    seed: int = 42,
    depths: Sequence[int] = (),
) -> list[Prompt]:
    """Make prompts of at most ``length`` tokens, as close to it as whole words allow.

    Args:
        data: Folder that scripts/fetch_ruler.py makes.
        count_tokens: Function that counts the tokens of a text, special tokens included.
        length: Tokens of a prompt.
        count: Number of prompts.
        seed: Seed of keys, values and depths.
        depths: Depths in per cent, taken in turn; empty: they are drawn.

    Raises:
        EvaluationError: The folder is not there, or not even the question fits.

    """
    try:
        haystack, keys = _haystack(data), _keys(data)
    except FileNotFoundError as error:
        raise EvaluationError(
            f"the needle's haystack {error.filename} is not there: run scripts/fetch_ruler.py, "
            "or name with --data the folder that holds ruler/"
        ) from error
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        key = rng.choice(keys)
        value = str(rng.randint(10**6, 10**7 - 1))
        (depth,) = rng.sample(RULER_DEPTHS, 1)
        rng.sample(range(1), 1)  # RULER draws which of the keys, here one, it asks for
        if depths:
            depth = depths[index % len(depths)]
        opening = OPENING.format(key=key)
        question = QUESTION.format(key=key) + opening
        needle = NEEDLE.format(key=key, value=value)
        prompts.append(
            Prompt(
                index=index,
                context=_context(haystack, needle, depth, question, length, count_tokens),
                question=question,
                opening=opening,
                references=(value,),
                max_tokens=MAX_TOKENS,
                metric="match_all",
                labels={"depth": depth},
            )
        )
    return prompts


def sentences(text: str) -> list[str]:
    """Split after closing punctuation; joined by blanks the parts are the text again."""
    ends = [match_.end() for match_ in _SENTENCE_END.finditer(text)]
    return [
        text[a:b].removesuffix(" ") for a, b in zip([0, *ends], [*ends, len(text)], strict=True)
    ]


def _haystack(data: Path) -> list[str]:
    text: str = json.loads((data / "PaulGrahamEssays.json").read_text(encoding="utf-8"))["text"]
    return re.sub(r"\s+", " ", text).split(" ")


class _Keys(Sequence[str]):
    """All texts "adjective-noun" in order, without the time and memory for six million of them.

    Adjectives that agree up to their first hyphen have keys that lie together in the order.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self._nouns = set(nouns)
        groups: dict[str, set[str]] = {}
        for adjective in adjectives:
            groups.setdefault(adjective.partition("-")[0] + "-", set()).add(adjective)
        self._groups = [groups[first] for first in sorted(groups)]
        self._ends = list(accumulate(self._count(group) for group in self._groups))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        at = bisect_right(self._ends, index)
        return sorted(self._keys(self._groups[at]))[index - self._ends[at]]

    def _count(self, group: set[str]) -> int:
        return len(self._nouns) if len(group) == 1 else len(self._keys(group))

    def _keys(self, group: set[str]) -> set[str]:
        return {f"{adjective}-{noun}" for adjective in group for noun in self._nouns}


def _keys(data: Path) -> _Keys:
    nouns, adjectives = (
        [line.rstrip() for line in (data / name).read_text(encoding="utf-8").splitlines()]
        for name in ("nounlist.txt", "adjectivelist.txt")
    )
    return _Keys(adjectives, nouns)


def _context(
    haystack: list[str],
    needle: str,
    depth: int,
    question: str,
    length: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The context with the longest haystack that fits."""

    def context(words: int) -> str:
        parts = sentences(" ".join(haystack[:words]).strip())
        at = int(len(parts) * (depth / 100))
        return CONTEXT.format(text=" ".join([" ".join(parts[:at]), needle, " ".join(parts[at:])]))

    # A word has at least one token.
    most = min(length, len(haystack))
    found = context(
        largest(0, most, lambda words: count_tokens(context(words) + question) <= length)
    )
    tokens = count_tokens(found + question)
    if tokens > length:
        raise EvaluationError(
            f"needle: the question alone has {tokens} tokens, more than the {length} asked for"
        )
    return found

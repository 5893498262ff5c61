"""Sums records up: a cell is one task, length and protocol under one setting, over its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import exp

from vllm_kvcompress.tools.evaluation.record import Record
from vllm_kvcompress.tools.evaluation.stats import Estimate, mean_difference, mean_of, mean_score
from vllm_kvcompress.tools.evaluation.task import EvaluationError

DIGITS = 5
"""Decimals of a score or likelihood that count; packed files have no more."""

DEPTH = "depth"
"""Label of a prompt: where in the context the needle lies, in per cent."""

Key = tuple[str, str, str, str, int, str, str, str, int]


@dataclass(frozen=True)
class Cell:
    """Prompts of all seeds under one setting; every tuple has a value per prompt.

    Attributes:
        model: As in :class:`.record.Record`, like all up to ``params``.
        dtype: Of weights and cache.
        source: Who answered, with version.
        task: Its name.
        length: Tokens asked for.
        protocol: Whether the question was compressed too.
        label: Of the setting.
        budget: As on the command line; empty for the full cache.
        block_size: Tokens of a block.
        method: The setting's.
        params: The method's, as JSON with sorted keys.
        prompts: Seed and index, ascending.
        scores: 0 to 1; empty where likelihoods were measured.
        nlls: Nats per token; empty where the model answered.
        depths: Of the needle in per cent; None for a prompt that has no such label.
        prompt_tokens: Mean that was compressed.
        kept_tokens: Mean that a layer held after the prefill.

    """

    model: str
    dtype: str
    source: str
    task: str
    length: int
    protocol: str
    label: str
    budget: str
    block_size: int
    method: str
    params: str
    prompts: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    nlls: tuple[float, ...]
    depths: tuple[float | None, ...]
    prompt_tokens: float
    kept_tokens: float

    @property
    def full(self) -> bool:
        """Whether nothing was compressed."""
        return not self.budget

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.prompts)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the prompts, ascending."""
        return tuple(sorted({seed for seed, _ in self.prompts}))

    @property
    def share(self) -> float:
        """Of the cache that was kept."""
        return self.kept_tokens / self.prompt_tokens

    @cached_property
    def score(self) -> Estimate | None:
        """Mean score; None where likelihoods were measured."""
        return mean_score([self.scores]) if self.scores else None

    @cached_property
    def nll(self) -> Estimate | None:
        """Mean of the prompts' nats per token; None where the model answered."""
        return mean_of([self.nlls]) if self.nlls else None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean :attr:`nll`."""
        return None if self.nll is None else exp(self.nll.value)

    @property
    def values(self) -> Mapping[tuple[str, int, int, int], float]:
        """Scores or likelihoods by task, length, seed and index."""
        values = self.scores or self.nlls
        keys = [(self.task, self.length, *prompt) for prompt in self.prompts]
        return dict(zip(keys, values, strict=True))


@dataclass(frozen=True)
class Difference:
    """Two settings on the same prompts.

    Attributes:
        estimate: Mean over tasks of the mean difference, first minus second; of scores or of nats.
        higher: Pairs where the first has the higher value.
        lower: Pairs where the second has.

    """

    estimate: Estimate
    higher: int
    lower: int

    @property
    def pairs(self) -> int:
        """Prompts that both have answered."""
        return self.estimate.n


def make_cells(records: Iterable[Record]) -> list[Cell]:
    """Sum records up.

    Returns:
        Cells in the order in which their first records come.

    Raises:
        EvaluationError: A prompt comes twice in a cell, two settings have one label, or a cell has
            both scores and likelihoods.

    """
    groups: dict[Key, list[Record]] = {}
    for record in records:
        key = (
            *(record.model, record.dtype, record.source, record.task, record.length),
            *(record.protocol, record.label, record.budget, record.block_size),
        )
        groups.setdefault(key, []).append(record)
    return [_cell(key, group) for key, group in groups.items()]


def average(cells: Sequence[Cell]) -> Estimate:
    """Mean of the cells' mean scores, each task counting alike, with a bootstrap within each.

    Raises:
        ValueError: A cell has no scores.

    """
    if not cells or not all(cell.scores for cell in cells):
        raise ValueError("the average is over cells with scores, one at least")
    return mean_score([cell.scores for cell in cells])


def paired(first: Sequence[Cell], second: Sequence[Cell]) -> Difference | None:
    """How much more ``first`` scores than ``second`` on the prompts that both have.

    Args:
        first: One setting's cells, each of another task or length.
        second: The other's.

    Returns:
        None if they have no prompt in common.

    Raises:
        EvaluationError: The two were asked other prompts under the same seeds and indices, as their
            numbers of tokens show.
        ValueError: The cells are of several models, or a task and length is among one setting's
            cells twice.

    """
    if len({cell.model for cell in [*first, *second]}) > 1:
        raise ValueError("only settings of one model can be paired")
    ours, others = _by_task(first), _by_task(second)
    strata: list[list[float]] = []
    for key, cell in ours.items():
        other = others.get(key)
        if other is None or bool(cell.scores) != bool(other.scores):
            continue
        if cell.prompts == other.prompts and cell.prompt_tokens != other.prompt_tokens:
            raise EvaluationError(
                f"{cell.task} of {cell.length} tokens: {cell.source} and {other.source} were asked "
                "other prompts, so they cannot be compared; make the records of one of them anew"
            )
        theirs = other.values
        differences = [
            value - theirs[prompt] for prompt, value in cell.values.items() if prompt in theirs
        ]
        if differences:
            strata.append(differences)
    if not strata:
        return None
    scores = any(cell.scores for cell in first)
    return Difference(
        mean_difference(strata, scores=scores),
        sum(value > 0 for values in strata for value in values),
        sum(value < 0 for values in strata for value in values),
    )


def _by_task(cells: Sequence[Cell]) -> dict[tuple[str, int], Cell]:
    found = {(cell.task, cell.length): cell for cell in cells}
    if len(found) < len(cells):
        raise ValueError("a task and length is there twice under one setting")
    return found


def _cell(key: Key, records: Sequence[Record]) -> Cell:
    model, dtype, source, task, length, protocol, label, budget, block_size = key
    where = f"{label!r} at {budget or 'full'} on {task}, {length} tokens"
    ordered = sorted(records, key=lambda record: (record.seed, record.index))
    prompts = tuple((record.seed, record.index) for record in ordered)
    if len(set(prompts)) < len(prompts):
        twice = next(a for a, b in pairwise(prompts) if a == b)
        raise EvaluationError(f"{where}: seed and index {twice} are there twice")
    # Most records of a cell share one mapping, which is written out once.
    mappings = {(r.method, id(r.params)): r.params for r in ordered}
    settings = {
        (name, json.dumps(params, sort_keys=True, default=dict))
        for (name, _), params in mappings.items()
    }
    if len(settings) > 1:
        raise EvaluationError(f"{where}: the label stands for several settings, {sorted(settings)}")
    scores = tuple(round(r.score, DIGITS) for r in ordered if r.score is not None)
    nlls = tuple(round(r.nll, DIGITS) for r in ordered if r.nll is not None)
    if sorted((len(scores), len(nlls))) != [0, len(ordered)]:
        raise EvaluationError(f"{where}: every prompt must have a score, or every one an nll")
    method, params = settings.pop()
    depths = [record.labels.get(DEPTH) for record in ordered]
    return Cell(
        *(model, dtype, source, task, length, protocol, label, budget, block_size, method, params),
        prompts=prompts,
        scores=scores,
        nlls=nlls,
        depths=tuple(None if depth is None else float(depth) for depth in depths),
        prompt_tokens=sum(record.prompt_tokens for record in ordered) / len(ordered),
        kept_tokens=sum(record.kept_tokens for record in ordered) / len(ordered),
    )

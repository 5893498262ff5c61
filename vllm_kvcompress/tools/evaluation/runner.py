"""Goes through all cells, and leaves out what the results hold already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_kvcompress.tools.evaluation.backend import Answer, Backend, Case
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, Record, Store
from vllm_kvcompress.tools.evaluation.setting import Setting
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task


@dataclass(frozen=True)
class Cell:
    """What is asked, without who answers.

    Attributes:
        task: Whose prompts.
        length: Tokens.
        protocol: Of :mod:`vllm_kvcompress.tools.evaluation.record`.
        seed: Of the prompts.
        count: Prompts.

    """

    task: Task
    length: int
    protocol: str
    seed: int
    count: int


@dataclass(frozen=True)
class Batch:
    """A cell's cases, as they are run."""

    cell: Cell
    cases: tuple[Case, ...]


def prepare(cells: Sequence[Cell], source: Source) -> list[Batch]:
    """Make the prompts of all cells.

    Raises:
        EvaluationError: A task's data is not there, or it has no such prompts.

    """
    batches = []
    for cell in cells:
        prompts = cell.task.prompts(source, length=cell.length, count=cell.count, seed=cell.seed)
        if not prompts:
            raise EvaluationError(f"{cell.task.name} has no prompts of {cell.length} tokens")
        batches.append(Batch(cell, tuple(encode(p, cell.protocol, source) for p in prompts)))
    return batches


def encode(prompt: Prompt, protocol: str, source: Source) -> Case:
    """Tokenize a prompt.

    Context and question are one text where the question is part of what is compressed, two where it
    comes later, as with kvpress. What is measured is a text of its own in either.
    """
    tokenizer = source.tokenizer
    measured: tuple[int, ...] = ()
    if prompt.measured is not None:
        measured = tuple(tokenizer(prompt.measured, add_special_tokens=False)["input_ids"])
    if protocol != AGNOSTIC or not prompt.question:
        ids = tokenizer(prompt.context + prompt.question)["input_ids"]
        return Case(prompt, tuple(ids), (), measured)
    context = tokenizer(prompt.context)["input_ids"]
    question = tokenizer(prompt.question, add_special_tokens=False)["input_ids"]
    return Case(prompt, tuple(context), tuple(question), measured)


def longest(batches: Sequence[Batch]) -> int:
    """Tokens of the longest case, its answer included."""
    return max(case.most_tokens for batch in batches for case in batch.cases)


class Runner:
    """Answers batches under settings.

    Args:
        backend: Who answers.
        model: Its name in the records.
        dtype: Likewise.
        store: Where records go, and which are there.

    """

    def __init__(self, backend: Backend, model: str, dtype: str, store: Store) -> None:
        self.backend = backend
        self.model = Path(model).name if Path(model).is_dir() else model
        self.dtype = dtype
        self.store = store

    def missing(self, batch: Batch, settings: Sequence[Setting]) -> int:
        """Pairs of case and setting that have no record yet."""
        return sum(
            not self._is_done(batch.cell, case, setting)
            for case in batch.cases
            for setting in settings
        )

    def run(self, batch: Batch, settings: Sequence[Setting]) -> Iterator[Record]:
        """Answer what is missing; every record is in the store when it is returned."""
        cell = batch.cell
        at_once = self.backend.cases_at_once(max(case.most_tokens for case in batch.cases))
        pending = [
            case
            for case in batch.cases
            if not all(self._is_done(cell, case, setting) for setting in settings)
        ]
        for start in range(0, len(pending), at_once):
            answers = self.backend.run(
                pending[start : start + at_once],
                settings,
                lambda case, setting: not self._is_done(cell, case, setting),
            )
            for case, setting, answer in answers:
                record = self._record(cell, case, setting, answer)
                self.store.append(record)
                yield record

    def _is_done(self, cell: Cell, case: Case, setting: Setting) -> bool:
        return self._record(cell, case, setting, Answer("", 0, 0)).key in self.store

    def _record(self, cell: Cell, case: Case, setting: Setting, answer: Answer) -> Record:
        prompt = case.prompt
        score = None
        if not case.measured_ids and prompt.metric:
            score = METRICS[prompt.metric].score(answer.text, prompt.references)
        return Record(
            model=self.model,
            dtype=self.dtype,
            source=self.backend.source,
            task=cell.task.name,
            length=cell.length,
            protocol=cell.protocol,
            seed=cell.seed,
            index=prompt.index,
            label=setting.label,
            method=setting.method,
            params=dict(setting.params),
            budget="" if setting.budget is None else str(setting.budget),
            block_size=self.backend.block_size,
            prompt_tokens=len(case.token_ids),
            kept_tokens=answer.kept_tokens,
            score=score,
            nll=answer.nll,
            tokens=answer.tokens,
            text=answer.text,
            labels=dict(prompt.labels),
        )

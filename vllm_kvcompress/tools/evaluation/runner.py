"""Runs sets of prompts under settings, without the pairs that already have a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_kvcompress.tools.evaluation.backend import Answer, Backend, EncodedPrompt
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, Record, Store
from vllm_kvcompress.tools.evaluation.setting import Setting
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one task, without the settings under which they are answered.

    Attributes:
        task: Task that makes the prompts.
        length: Tokens of a prompt, as the task takes it.
        protocol: One of ``record.PROTOCOLS``.
        seed: Seed of the prompts.
        count: Number of prompts.
        cases: The prompts' tokens; empty until :func:`prepare` has made them.

    """

    task: Task
    length: int
    protocol: str
    seed: int
    count: int
    cases: tuple[EncodedPrompt, ...] = ()


def prepare(prompt_sets: Sequence[PromptSet], source: Source) -> list[PromptSet]:
    """Make the prompts of all sets.

    Raises:
        EvaluationError: A task's data is not there, or it has no such prompts.

    """
    made = []
    for one in prompt_sets:
        prompts = one.task.prompts(source, length=one.length, count=one.count, seed=one.seed)
        if not prompts:
            raise EvaluationError(f"{one.task.name} has no prompts of {one.length} tokens")
        cases = tuple(encode(prompt, one.protocol, source) for prompt in prompts)
        made.append(replace(one, cases=cases))
    return made


def encode(prompt: Prompt, protocol: str, source: Source) -> EncodedPrompt:
    """Tokenize a prompt.

    Context and question are one text where the question is part of what is compressed, two where it
    comes later, as with kvpress. What is measured is a text of its own in either.
    """
    tokenizer = source.tokenizer
    measured: tuple[int, ...] = ()
    if prompt.measured is not None:
        measured = tuple(tokenizer(prompt.measured, add_special_tokens=False)["input_ids"])
    if protocol != AGNOSTIC or not prompt.question:
        ids = tokenizer(prompt.text)["input_ids"]
        return EncodedPrompt(prompt, tuple(ids), (), measured)
    context = tokenizer(prompt.context)["input_ids"]
    question = tokenizer(prompt.question, add_special_tokens=False)["input_ids"]
    return EncodedPrompt(prompt, tuple(context), tuple(question), measured)


def longest(batches: Sequence[PromptSet]) -> int:
    """Tokens of the longest case, its answer included."""
    return max(case.most_tokens for batch in batches for case in batch.cases)


class Runner:
    """Runs batches of prompts under settings.

    Args:
        backend: Software that answers.
        model: Folder or name of the model; the records have its name.
        dtype: Data type of weights and cache, for the records.
        store: File of the records, old and new.

    """

    def __init__(self, backend: Backend, model: str, dtype: str, store: Store) -> None:
        self.backend = backend
        self.model = Path(model).name if Path(model).is_dir() else model
        self.dtype = dtype
        self.store = store

    def missing(self, batch: PromptSet, settings: Sequence[Setting]) -> int:
        """Pairs of case and setting that have no record yet."""
        return sum(
            not self._is_done(batch, case, setting) for case in batch.cases for setting in settings
        )

    def run(self, batch: PromptSet, settings: Sequence[Setting]) -> Iterator[Record]:
        """Answer what is missing; every record is in the store when it is returned."""
        at_once = self.backend.cases_at_once(max(case.most_tokens for case in batch.cases))
        asked = [
            (case, [setting for setting in settings if not self._is_done(batch, case, setting)])
            for case in batch.cases
        ]
        pending = [(case, missing) for case, missing in asked if missing]
        for start in range(0, len(pending), at_once):
            answers = self.backend.run(pending[start : start + at_once])
            for case, setting, answer in answers:
                record = self._record(batch, case, setting, answer)
                self.store.append(record)
                yield record

    def _is_done(self, batch: PromptSet, case: EncodedPrompt, setting: Setting) -> bool:
        return self._record(batch, case, setting, Answer("", 0, 0)).key in self.store

    def _record(
        self, batch: PromptSet, case: EncodedPrompt, setting: Setting, answer: Answer
    ) -> Record:
        prompt = case.prompt
        score = None
        if not case.measured_ids and prompt.metric:
            score = METRICS[prompt.metric].score(answer.text, prompt.references)
        return Record(
            model=self.model,
            dtype=self.dtype,
            source=self.backend.source,
            task=batch.task.name,
            length=batch.length,
            protocol=batch.protocol,
            seed=batch.seed,
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

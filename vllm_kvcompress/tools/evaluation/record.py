"""Results on disk: one line a prompt and setting, appended as they come, read again to go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.evaluation.json_lines import append_line, read_lines
from vllm_kvcompress.tools.evaluation.task import EvaluationError

RECORDS = "results.jsonl"
"""Name of the file of records in a run's folder."""

AWARE, AGNOSTIC = "query-aware", "query-agnostic"
PROTOCOLS = (AWARE, AGNOSTIC)
"""Whether the question is part of what is compressed, or comes after the compression."""


@dataclass(frozen=True)
class Record:
    """One prompt under one setting.

    Attributes:
        model: Name of the model's folder, or its identifier.
        dtype: Data type of weights and cache.
        source: Name and version of the software that answered, such as ``vllm_kvcompress 0.1.0``.
        task: Name of the task.
        length: Tokens asked for; the prompt's own are ``prompt_tokens``.
        protocol: One of :data:`PROTOCOLS`.
        seed: Seed of the prompts.
        index: Number of the prompt among those of its task, length and seed.
        label: Name of the setting.
        method: Method of the setting.
        params: Parameters of the method that were given.
        budget: Budget as on the command line; empty for the full cache.
        block_size: Tokens of a block.
        prompt_tokens: Tokens that were compressed.
        kept_tokens: Tokens that a layer held on average after the prefill.
        score: Score from 0 to 1, or None where a likelihood was measured.
        nll: Nats per token, or None where the model answered.
        tokens: Tokens generated or measured.
        text: The answer.
        labels: Labels of the prompt.

    """

    model: str
    dtype: str
    source: str
    task: str
    length: int
    protocol: str
    seed: int
    index: int
    label: str
    method: str
    params: Mapping[str, Any]
    budget: str
    block_size: int
    prompt_tokens: int
    kept_tokens: int
    score: float | None
    nll: float | None
    tokens: int
    text: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """Values that identify this result; a prompt is run if no record has its key."""
        return (
            *(self.model, self.dtype, self.source, self.task, self.length, self.protocol),
            *(self.seed, self.index, self.label, _frozen(self.params), self.budget),
            self.block_size,
        )


class Store:
    """A file of records.

    Args:
        path: JSON lines; made when the first record comes. A last line that a killed run left
            without its end is dealt with as :mod:`.json_lines` says.

    Raises:
        EvaluationError: The file cannot be read, or holds something else.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys = {record.key for record in read(path)}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, record: Record) -> None:
        """Write a record to the end of the file, and have it there when this returns.

        Raises:
            EvaluationError: The file cannot be written.

        """
        append_line(self.path, asdict(record))
        self._keys.add(record.key)


def read(path: Path) -> Iterator[Record]:
    """Records of a file; none if it is not there.

    Raises:
        EvaluationError: The file cannot be read, or a line is no record.

    """
    names = {f.name for f in fields(Record)}
    for number, values in read_lines(path):
        try:
            record = Record(**{name: values[name] for name in names if name in values})
            hash(record.key)
        except (TypeError, KeyError) as error:
            raise EvaluationError(f"{path}, line {number}, is no result: {error}") from error
        yield record


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=dict)

"""Results on disk: one line a prompt and setting, appended as they come, read again to go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

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
        path: JSON lines; made when the first record comes.

    Raises:
        EvaluationError: The file holds something else. A last line that was cut off, as a killed
            run leaves it, is dropped from the file.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys = {record.key for record in read(path, repair=True)}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, record: Record) -> None:
        """Write a record to the end of the file, and have it there when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._keys.add(record.key)


def read(path: Path, *, repair: bool = False) -> Iterator[Record]:
    """Records of a file; none if it is not there.

    Args:
        path: JSON lines.
        repair: Cut off a last line that is not whole; else it is only passed over.

    Raises:
        EvaluationError: A line is no record.

    """
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    names = {f.name for f in fields(Record)}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            values = json.loads(line)
            record = Record(**{name: values[name] for name in names if name in values})
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(f"{path}, line {number}, is no result: {error}") from error
        yield record


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=dict)

"""Records as a text file small enough to commit, from which every table can be made again.

A line holds all prompts of one task, length, protocol and seed under one setting: means of the
tokens, and of every prompt its index, its score or likelihood with
``results_frame.DIGITS`` decimals, and its needle's depth. Answers are left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_kvcompress.tools.evaluation.record import Record
from vllm_kvcompress.tools.evaluation.results_frame import DEPTH, DIGITS
from vllm_kvcompress.tools.evaluation.task import EvaluationError

HEAD = (
    *("model", "dtype", "source", "task", "length", "protocol", "seed", "label", "method"),
    *("params", "budget", "block_size"),
)
"""Columns that are equal in all prompts of a line."""

COLUMNS = (*HEAD, "prompt_tokens", "kept_tokens", "indices", "scores", "nlls", "depths")

_NOTE = "# "


def pack(records: Iterable[Record], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write records to ``path``, which is replaced.

    Args:
        records: Records in any order; settings stay in the order in which they first come.
        path: Path of the CSV file, which has the notes in comment lines before its header.
        notes: Further remarks by name, such as the command line and the versions.

    Raises:
        EvaluationError: A note has a line end.

    """
    lines: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        params = json.dumps(record.params, sort_keys=True, default=dict, separators=(",", ":"))
        values = (params if name == "params" else getattr(record, name) for name in HEAD)
        lines.setdefault(tuple(values), []).append(record)
    text = io.StringIO()
    for name, note in (notes or {}).items():
        if "\n" in name + note or ":" in name:
            raise EvaluationError(f"note {name!r} must be one line, its name without a colon")
        text.write(f"{_NOTE}{name}: {note}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    # Lines that differ only by their setting stay in the order in which they first come.
    for head, group in sorted(lines.items(), key=lambda line: _place(line[1][0])):
        group.sort(key=lambda record: record.index)
        depths = [record.labels.get(DEPTH) for record in group]
        writer.writerow(
            [
                *head,
                _number(fmean(record.prompt_tokens for record in group)),
                _number(fmean(record.kept_tokens for record in group)),
                _ranges([record.index for record in group]),
                _values([record.score for record in group]),
                _values([record.nll for record in group]),
                _values([None if depth is None else float(depth) for depth in depths]),
            ]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue(), encoding="utf-8")


def unpack(path: Path) -> list[Record]:
    """Read records back, without answers and with no label but the depth.

    Tokens are divided among the prompts of a line so that their sums are those that were packed;
    a frame of them is equal to that of the packed records.

    Raises:
        EvaluationError: The file is not there, or a line is none that :func:`pack` writes.

    """
    lines = _lines(path)
    start = sum(line.startswith(_NOTE) for line in lines)
    reader = csv.DictReader(lines[start:])
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise EvaluationError(f"{path} must have the columns {', '.join(COLUMNS)}")
    records: list[Record] = []
    for row in reader:
        try:
            records += _records(row)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            line = start + reader.line_num
            raise EvaluationError(f"{path}, line {line}, is no packed result: {error}") from error
    return records


def read_notes(path: Path) -> dict[str, str]:
    """Notes at the head of a packed file, in their order.

    Raises:
        EvaluationError: The file is not there.

    """
    notes = {}
    for line in _lines(path):
        if not line.startswith(_NOTE):
            break
        name, _, note = line.removeprefix(_NOTE).partition(": ")
        notes[name] = note
    return notes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise EvaluationError(f"there is no file {path}") from error


def _place(record: Record) -> tuple[str | int, ...]:
    names = ("model", "dtype", "source", "protocol", "task", "length", "seed")
    return tuple(getattr(record, name) for name in names)


def _number(value: float) -> str:
    """Every digit of a float, and no point for a whole one."""
    return str(int(value)) if value == int(value) else repr(value)


def _values(values: Sequence[float | None]) -> str:
    """Space-separated; ``-`` for a prompt without value, nothing if none has one."""
    if all(value is None for value in values):
        return ""
    return " ".join("-" if value is None else _number(round(value, DIGITS)) for value in values)


def _read_values(text: str, count: int) -> list[float | None]:
    if not text:
        return [None] * count
    values = [None if word == "-" else float(word) for word in text.split()]
    if len(values) != count:
        raise ValueError(f"{count} prompts have {len(values)} values")
    return values


def _ranges(indices: Sequence[int]) -> str:
    """Ascending numbers, such as ``0-49 60``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def _read_ranges(text: str) -> list[int]:
    indices: list[int] = []
    for word in text.split():
        low, _, high = word.partition("-")
        indices += range(int(low), int(high or low) + 1)
    return indices


def _spread(mean: float, count: int) -> list[int]:
    """Whole numbers that differ by at most one and have this mean."""
    quotient, rest = divmod(round(mean * count), count)
    return [quotient + (number < rest) for number in range(count)]


def _records(row: Mapping[str | Any, str | Any]) -> list[Record]:
    if None in row or None in row.values():  # as DictReader marks lines of another length
        raise ValueError(f"it must have {len(COLUMNS)} columns")
    indices = _read_ranges(row["indices"])
    count = len(indices)
    columns = zip(
        indices,
        _read_values(row["scores"], count),
        _read_values(row["nlls"], count),
        _read_values(row["depths"], count),
        _spread(float(row["prompt_tokens"]), count),
        _spread(float(row["kept_tokens"]), count),
        strict=True,
    )
    common: dict[str, Any] = {name: row[name] for name in HEAD}
    common |= {name: int(row[name]) for name in ("length", "seed", "block_size")}
    common["params"] = json.loads(row["params"])
    return [
        Record(
            **common,
            index=index,
            prompt_tokens=prompt_tokens,
            kept_tokens=kept_tokens,
            score=score,
            nll=nll,
            tokens=0,
            labels={} if depth is None else {DEPTH: depth},
        )
        for index, score, nll, depth, prompt_tokens, kept_tokens in columns
    ]

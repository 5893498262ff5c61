"""Files of JSON objects, one a line, that are whole after a kill at any moment.

A kill can leave a last line without its end. If the object is whole, only the line's end is missing
and it counts; else it is cut off before the next line is written. Reading changes no file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.evaluation.task import EvaluationError


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the objects of a file with the numbers of their lines; none if there is no file.

    Raises:
        EvaluationError: The file cannot be read, or a line is no JSON in UTF-8.

    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    *lines, last = data.split(b"\n")
    for number, line in enumerate([*lines, last] if _is_whole(last) else lines, 1):
        try:
            yield number, json.loads(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one
            raise EvaluationError(f"{path}, line {number}, is no result: {error}") from error


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object to the end of a file, and have it there when this returns.

    Raises:
        EvaluationError: The file cannot be written.

    """
    line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.write(_mended(file) + line)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror}") from error


def _mended(file: Any) -> bytes:
    """Cut off a last line that is not whole; return the line's end if only that is missing."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return b""
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return b""
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    if _is_whole(data[start:]):
        return b"\n"
    file.truncate(start)
    return b""


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except ValueError:
        return False

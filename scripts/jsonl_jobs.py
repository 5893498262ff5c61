"""The files of a batch job: prompts in, answers out, both JSONL, resumable at any point."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_kvcompress.tools.arguments import CommandError

Id = str | int


@dataclass(frozen=True)
class JobPrompt:
    """One line of the input: a text to continue, or the messages of a chat."""

    id: Id
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


def parse_prompt(line: str, number: int, where: Path) -> JobPrompt:
    """Read a line of the input.

    Args:
        line: Its text.
        number: Its number from 1, which is the prompt's id where the line has none.
        where: The file, for messages.

    Raises:
        CommandError: The line is not a prompt.

    """

    def error(what: str) -> CommandError:
        return CommandError(f"{where}, line {number}: {what}.")

    try:
        entry = json.loads(line)
    except json.JSONDecodeError as problem:
        raise error(f"not JSON ({problem.msg})") from None
    if not isinstance(entry, dict):
        raise error("not a JSON object")
    name = entry.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise error('"id" is neither text nor a whole number')
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        raise error('exactly one of "prompt" and "messages" is needed')
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise error('"prompt" is not a text, or empty')
    if messages is not None and not (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    ):
        raise error('"messages" is not a list of objects with "role" and "content"')
    return JobPrompt(name, prompt, messages)


def read_prompts(path: Path) -> list[JobPrompt]:
    """Return all prompts; CommandError for the first thing that is wrong with the file."""
    seen: dict[Id, int] = {}
    prompts = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                prompt = parse_prompt(line, number, path)
                if prompt.id in seen:
                    raise CommandError(
                        f"{path}, line {number}: id {prompt.id!r} is that of line "
                        f"{seen[prompt.id]} too."
                    )
                seen[prompt.id] = number
                prompts.append(prompt)
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text.") from None
    if not prompts:
        raise CommandError(f"{path} holds no prompt.")
    return prompts


def answered_ids(file: BinaryIO, where: Path) -> set[Id]:
    """Return the ids that the output answers, and cut off an incomplete last line.

    An answer is written as one line that ends with a newline, so what a killed run left after the
    last newline is part of an answer.
    """
    file.seek(0)
    contents = file.read()
    whole = contents.rfind(b"\n") + 1
    if whole < len(contents):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
    ids: set[Id] = set()
    for number, line in enumerate(contents[:whole].splitlines(), start=1):
        try:
            name = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"{where}, line {number}: not an answer of this script.") from None
        if name in ids:
            raise CommandError(f"{where}, line {number}: a second answer to id {name!r}.")
        ids.add(name)
    return ids


def append_answers(file: BinaryIO, answers: list[dict[str, Any]]) -> None:
    """Add whole lines and wait until they are on the disk."""
    file.write(b"".join(json.dumps(a, ensure_ascii=False).encode() + b"\n" for a in answers))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """Open the output for this process alone: two runs on one file would answer twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"Another run is writing to {path}.") from None
        yield file


def remaining(prompts: list[JobPrompt], file: BinaryIO, where: Path) -> list[JobPrompt]:
    """Return the prompts that have no answer yet."""
    done = answered_ids(file, where)
    unknown = done - {prompt.id for prompt in prompts}
    if unknown:
        raise CommandError(
            f"{where} answers id {min(unknown, key=str)!r}, which the input lacks: "
            "name another output."
        )
    return [prompt for prompt in prompts if prompt.id not in done]

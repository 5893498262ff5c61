"""``kvcompress eval`` stopped by Ctrl-C at any answer, and given again."""

import json
from pathlib import Path

import pytest

from tests.tools.test_eval_runner import Parrot, Questions, Words
from vllm_kvcompress.tools.arguments import STOPPED
from vllm_kvcompress.tools.cli import main
from vllm_kvcompress.tools.evaluation import markdown_page, run, tasks
from vllm_kvcompress.tools.evaluation.record import read

PROMPTS, SETTINGS = 3, 2


@pytest.mark.parametrize("answers", range(PROMPTS * SETTINGS))
def test_an_interrupt_loses_nothing_and_nothing_is_asked_twice(
    answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    backends = [Parrot(fail_after=answers), Parrot()]
    waiting = iter(backends)
    monkeypatch.setattr(run, "_tokenizer", lambda model: Words())
    monkeypatch.setattr(tasks, "find", lambda *names: [Questions()])
    monkeypatch.setattr(run, "_backend", lambda *arguments: next(waiting))
    # Tables and pictures of what there is have tests of their own.
    monkeypatch.setattr(markdown_page, "write_results", lambda folder, **facts: [folder / "x.md"])
    words = ["eval", "--model", "m", "--output", str(tmp_path), "--prompts", str(PROMPTS)]
    words += ["--methods", "full,snapkv", "--budgets", "0.5", "--lengths", "20"]

    assert main(words) == STOPPED
    path = tmp_path / "results.jsonl"
    first = list(read(path))
    assert len(first) == answers
    said = capsys.readouterr()
    assert "stopped: the same command goes on from here" in said.err
    assert "Traceback" not in said.err
    assert not said.out

    assert main(words) == 0
    asked = [one for backend in backends for one in backend.asked]
    assert len(asked) == len(set(asked)) == PROMPTS * SETTINGS
    found = list(read(path))
    assert found[:answers] == first
    assert len({record.key for record in found}) == len(found) == PROMPTS * SETTINGS
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()]
    assert sum(line["answers"] for line in runs) == PROMPTS * SETTINGS

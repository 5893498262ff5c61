"""scripts/batch_inference.py: its files, and prompts that vLLM refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from batch_inference import answer_batch
from jsonl_jobs import (
    JobPrompt,
    append_answers,
    output_file,
    parse_prompt,
    read_prompts,
    remaining,
)
from vllm_kvcompress.tools.arguments import CommandError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "batch_inference.py"


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_prompts_take_their_line_number_as_id_and_blank_lines_are_skipped(tmp_path):
    path = write_lines(
        tmp_path / "in.jsonl",
        '{"prompt": "a"}',
        "",
        '{"id": "x", "messages": [{"role": "user", "content": "b"}]}',
        '{"prompt": "c"}',
    )
    assert [prompt.id for prompt in read_prompts(path)] == [1, "x", 4]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"', "line 7: not JSON"),
        ('["a"]', "line 7: not a JSON object"),
        ('{"id": 1}', "exactly one of"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "exactly one of"),
        ('{"prompt": ""}', '"prompt" is not a text'),
        ('{"prompt": 3}', '"prompt" is not a text'),
        ('{"messages": []}', '"messages" is not a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" is not a list'),
        ('{"id": true, "prompt": "a"}', '"id" is neither'),
        ('{"id": 1.5, "prompt": "a"}', '"id" is neither'),
        ('{"id": null, "prompt": "a"}', '"id" is neither'),
    ],
)
def test_a_malformed_line_is_named(line, complaint):
    with pytest.raises(CommandError, match=complaint):
        parse_prompt(line, 7, Path("in.jsonl"))


def test_a_duplicate_id_is_named_with_both_lines(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", '{"prompt": "a"}', '{"id": 1, "prompt": "b"}')
    with pytest.raises(CommandError, match=r"line 2: id 1 is that of line 1 too"):
        read_prompts(path)


def test_an_input_without_prompts_is_refused(tmp_path):
    with pytest.raises(CommandError, match="holds no prompt"):
        read_prompts(write_lines(tmp_path / "in.jsonl", ""))


PROMPTS = [JobPrompt(i, prompt="a") for i in (1, 2, 3, "x")]


def test_cutting_the_output_anywhere_never_loses_or_repeats_an_answer(tmp_path):
    path = tmp_path / "out.jsonl"
    # Answers need not come in the order of the prompts.
    first = [PROMPTS[0], PROMPTS[3], PROMPTS[1], PROMPTS[2]]
    with output_file(path) as file:
        append_answers(file, [{"id": p.id, "answer": "öß\n"} for p in first])
    whole = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["answer"] for line in whole] == ["öß\n"] * 4
    for length in range(sum(map(len, whole)) + 1):
        kept = b"".join(whole)[:length]
        path.write_bytes(kept)
        with output_file(path) as file:
            todo = remaining(PROMPTS, file, path)
            assert path.read_bytes() == kept[: kept.rfind(b"\n") + 1]
            append_answers(file, [{"id": p.id, "answer": "öß\n"} for p in todo])
        assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(whole)


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        ('{"id": 9}\n', "answers id 9, which the input lacks"),
        ('{"id": 1}\n{"id": 1}\n', "line 2: a second answer to id 1"),
        ('{"id": 1}\nhello\n{"id": 2}\n', "line 2: not an answer"),
        ('{"answer": 1}\n', "line 1: not an answer"),
    ],
)
def test_an_output_of_something_else_is_left_alone(tmp_path, contents, complaint):
    path = tmp_path / "out.jsonl"
    path.write_text(contents)
    with output_file(path) as file, pytest.raises(CommandError, match=complaint):
        remaining(PROMPTS, file, path)
    assert path.read_text() == contents


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with output_file(path), pytest.raises(CommandError, match="Another run"), output_file(path):
        pass


class PickyEngine:
    """Refuses the prompt "bad" as vLLM refuses one that is too long: the whole call fails."""

    def generate(self, prompts, sampling, use_tqdm):
        if "bad" in prompts:
            raise ValueError("too long")
        return [_output(prompt) for prompt in prompts]

    def chat(self, chats, sampling, use_tqdm):
        return [_output(messages[0]["content"]) for messages in chats]


def _output(text):
    completion = SimpleNamespace(text=text.upper(), token_ids=(1, 2), finish_reason="stop")
    return SimpleNamespace(prompt_token_ids=(1,), outputs=(completion,))


def test_a_refused_prompt_does_not_take_its_batch_along():
    batch = [
        JobPrompt(1, prompt="one"),
        JobPrompt(2, prompt="bad"),
        JobPrompt(3, messages=[{"role": "user", "content": "three"}]),
    ]
    answers = {a["id"]: a for a in answer_batch(PickyEngine(), None, batch)}
    assert answers[1]["answer"] == "ONE"
    assert answers[3]["answer"] == "THREE"
    assert answers[2]["answer"] is None
    assert answers[2]["error"] == "too long"


def test_a_mistake_in_the_input_is_reported_before_vllm_is_imported(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", '{"prompt": "a"}', '{"prompt": ')
    command = [sys.executable, SCRIPT, "--model", "none", "--input", source]
    command += ["--output", tmp_path / "out.jsonl"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "line 2: not JSON" in done.stderr
    assert time.monotonic() - begin < 5

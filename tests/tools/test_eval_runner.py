"""The runner leaves out what is there, and goes on where a killed run stopped."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vllm_kvcompress.tools.evaluation.backend import Answer, Asked, Backend, EncodedPrompt
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE, Record, Store, read
from vllm_kvcompress.tools.evaluation.runner import (
    PromptSet,
    Runner,
    encode,
    longest,
    prepare,
)
from vllm_kvcompress.tools.evaluation.setting import Setting, full, kept_tokens
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task


class Words:
    """A tokenizer: a token a character, after a first token of its own."""

    vocab_size = 128

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        first = [1] if add_special_tokens else []
        return {"input_ids": first + [ord(letter) for letter in text]}


class Questions(Task):
    """As many prompts as asked for, each with its own answer."""

    name = "questions"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        return [
            Prompt(
                index=index,
                context="x" * (length - 3),
                question="?" * 3,
                references=(f"{seed}-{index}",),
                max_tokens=7,
                metric="match_all",
            )
            for index in range(count)
        ]


class Parrot(Backend):
    """Right under the full cache, wrong under any other; counts what it is asked."""

    source = "parrot 1"
    block_size = 4

    def __init__(self, fail_after: int = 1000) -> None:
        self.asked: list[tuple[int, str]] = []
        self.chunks: list[int] = []
        self.fail_after = fail_after

    def check(self, settings: Sequence[Setting]) -> None:
        pass

    def cases_at_once(self, longest: int) -> int:
        return 2

    def run(self, chunk: Sequence[Asked]) -> Iterator[tuple[EncodedPrompt, Setting, Answer]]:
        self.chunks.append(len(chunk))
        for case, settings in chunk:
            for setting in settings:
                if len(self.asked) == self.fail_after:
                    raise KeyboardInterrupt
                self.asked.append((case.prompt.index, setting.label))
                text = case.prompt.references[0] if setting.is_full else "?"
                yield case, setting, Answer(text, 2, kept_tokens(setting.budget, 20, 4, 4))

    def close(self) -> None:
        pass


SETTINGS = (full(), Setting("half", "uniform", 0.5))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source("model", Words(), tmp_path, tmp_path)


def batch_of(source: Source, count: int = 3, protocol: str = AWARE, seed: int = 0) -> PromptSet:
    (batch,) = prepare([PromptSet(Questions(), 20, protocol, seed, count)], source)
    return batch


def test_every_pair_is_answered_once_and_scored(source: Source, tmp_path: Path) -> None:
    backend = Parrot()
    store = Store(tmp_path / "results.jsonl")
    runner = Runner(backend, "model", "float32", store)
    batch = batch_of(source)
    assert runner.missing(batch, SETTINGS) == 6
    made = list(runner.run(batch, SETTINGS))
    assert sorted(backend.asked) == [(i, label) for i in range(3) for label in ("full", "half")]
    assert backend.chunks == [2, 1]
    assert {(r.label, r.score) for r in made} == {("full", 1.0), ("half", 0.0)}
    assert list(read(store.path)) == made
    assert {r.kept_tokens for r in made} == {20, 12}
    assert {r.prompt_tokens for r in made} == {21}


def test_a_second_run_asks_only_what_is_missing(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Parrot(fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        list(Runner(first, "model", "float32", Store(path)).run(batch_of(source), SETTINGS))
    second = Parrot()
    runner = Runner(second, "model", "float32", Store(path))
    assert runner.missing(batch_of(source), SETTINGS) == 2
    list(runner.run(batch_of(source), SETTINGS))
    assert sorted(first.asked + second.asked) == [
        (i, label) for i in range(3) for label in ("full", "half")
    ]
    third = Parrot()
    runner = Runner(third, "model", "float32", Store(path))
    assert list(runner.run(batch_of(source), SETTINGS)) == []
    assert third.asked == []


@pytest.mark.parametrize(
    "other",
    [
        (Setting("half", "uniform", 0.25),),
        (Setting("half", "uniform", 0.5, {"window": 8}),),
        (Setting("other", "uniform", 0.5),),
    ],
)
def test_another_setting_is_another_result(
    source: Source, tmp_path: Path, other: tuple[Setting, ...]
) -> None:
    runner = Runner(Parrot(), "model", "float32", Store(tmp_path / "results.jsonl"))
    list(runner.run(batch_of(source), SETTINGS))
    assert runner.missing(batch_of(source), SETTINGS) == 0
    assert runner.missing(batch_of(source), other) == 3
    assert runner.missing(batch_of(source, protocol=AGNOSTIC), SETTINGS) == 6
    assert runner.missing(batch_of(source, seed=1), SETTINGS) == 6
    assert runner.missing(batch_of(source, count=5), SETTINGS) == 4


def test_a_line_cut_off_by_a_kill_is_dropped(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    made = list(Runner(Parrot(), "model", "float32", Store(path)).run(batch_of(source), SETTINGS))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert list(read(path)) == made[:-1]
    store = Store(path)
    assert len(store) == len(made) - 1
    store.append(made[-1])
    assert path.read_bytes() == whole


def test_a_kill_at_any_byte_loses_no_whole_result_and_repeats_none(
    source: Source, tmp_path: Path
) -> None:
    path, batch = tmp_path / "results.jsonl", batch_of(source)
    made = list(Runner(Parrot(), "modèle", "float32", Store(path)).run(batch, SETTINGS))
    whole = path.read_bytes()
    start = whole.rstrip().rfind(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        text_is_there = end >= len(whole) - 1  # at most the line's end is missing
        again = Parrot()
        runner = Runner(again, "modèle", "float32", Store(path))
        assert path.read_bytes() == whole[:end]  # looking changes nothing
        list(runner.run(batch, SETTINGS))
        assert len(again.asked) == (0 if text_is_there else 1)
        assert list(read(path)) == made


def test_results_of_other_settings_stay_in_the_file(source: Source, tmp_path: Path) -> None:
    path, batch = tmp_path / "results.jsonl", batch_of(source)
    made = list(Runner(Parrot(), "model", "float32", Store(path)).run(batch, SETTINGS))
    path.write_bytes(path.read_bytes()[:-1])  # killed before the last line's end
    others = (Setting("half", "uniform", 0.25), *SETTINGS)
    backend = Parrot(fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        list(Runner(backend, "model", "float32", Store(path)).run(batch, others))
    more = list(Runner(Parrot(), "model", "float32", Store(path)).run(batch, others))
    found = list(read(path))
    assert found[:6] == made
    assert [r.budget for r in found[6:]] == ["0.25"] * 3
    assert found[8:] == more
    assert len({record.key for record in found}) == len(found) == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\n", "line 1, is no result: 'utf-8' codec can't decode byte 0xff"),
        (b"[1]\n", "line 1, is no result: "),
        (b"\n", "line 1, is no result: "),
        (b'{"model": "m"}', "line 1, is no result: "),
    ],
)
def test_a_file_of_something_else_is_named_and_left_as_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=re.escape(f"results.jsonl, {said}")) as error:
        Store(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_result_that_cannot_be_written_is_one_sentence(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    runner = Runner(Parrot(), "model", "float32", Store(path))
    path.mkdir()  # a disk that is full says so in the same way
    with pytest.raises(EvaluationError, match=r"^cannot write .*results.jsonl: Is a directory$"):
        list(runner.run(batch_of(source), SETTINGS))


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"model": "m"}\n')
    with pytest.raises(EvaluationError, match=r"results.jsonl, line 1, is no result"):
        Store(path)


def test_texts_with_odd_line_ends_survive(source: Source, tmp_path: Path) -> None:
    runner = Runner(Parrot(), "model", "float32", Store(tmp_path / "a.jsonl"))
    (record, *_) = runner.run(batch_of(source), SETTINGS)
    odd = Record(**{**vars(record), "text": "a\u2028b\r\nc\x85d"})
    Store(tmp_path / "b.jsonl").append(odd)
    assert list(read(tmp_path / "b.jsonl")) == [odd]
    assert json.loads((tmp_path / "b.jsonl").read_text("utf-8"))["text"] == odd.text


def test_the_question_comes_after_the_compression_if_that_is_the_protocol(source: Source) -> None:
    prompt = Prompt(0, "abc", "de", ("f",), 5, "match_all")
    aware, agnostic = encode(prompt, AWARE, source), encode(prompt, AGNOSTIC, source)
    assert aware.token_ids == (1, *map(ord, "abcde"))
    assert aware.fed_ids == ()
    assert agnostic.token_ids == (1, *map(ord, "abc"))
    assert agnostic.fed_ids == tuple(map(ord, "de"))
    assert aware.most_tokens == agnostic.most_tokens == 11


def test_what_is_measured_is_tokenized_on_its_own(source: Source) -> None:
    case = encode(Prompt(0, "abc", "", (), measured=" yes"), AWARE, source)
    assert case.measured_ids == tuple(map(ord, " yes"))
    assert case.most_tokens == 4 + 4


def test_the_longest_case_decides_the_engine(source: Source) -> None:
    cells = [PromptSet(Questions(), n, AWARE, 0, 2) for n in (10, 30, 20)]
    assert longest(prepare(cells, source)) == 1 + 30 + 7


def test_a_cell_without_prompts_is_refused(source: Source) -> None:
    with pytest.raises(EvaluationError, match="questions has no prompts of 20 tokens"):
        batch_of(source, count=0)


@pytest.mark.parametrize(
    ("budget", "tokens", "kept"),
    [
        (None, 700, 700),
        (0.125, 1024, 128),
        (0.25, 700, 192),  # 175 tokens are six blocks of 32
        (0.069, 700, 64),  # at least the window and one block
        (512, 300, 300),  # fits: nothing is cut
        (512, 4096, 512),
    ],
)
def test_kept_tokens(budget: float | None, tokens: int, kept: int) -> None:
    assert kept_tokens(budget, tokens, 32) == kept

"""The command line of ``kvcompress eval``: what it compares, and what it refuses."""

import argparse
import json
from pathlib import Path

import pytest

from tests.e2e.harness import MODELS, REPO, SMALL
from tests.support.commands import refusal
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.cli import build_parser, main
from vllm_kvcompress.tools.evaluation import run
from vllm_kvcompress.tools.evaluation.command import settings_of
from vllm_kvcompress.tools.evaluation.setting import FULL


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["eval", "--model", "m", "--output", "out", *words])


def test_methods_times_budgets_with_the_full_cache_once() -> None:
    settings = settings_of(parsed("--methods", "full,cake,snapkv", "--budgets", "0.25,128"))
    assert [(s.label, s.method, s.budget) for s in settings] == [
        (FULL, "none", None),
        ("cake", "cake", 0.25),
        ("cake", "cake", 128),
        ("snapkv", "snapkv", 0.25),
        ("snapkv", "snapkv", 128),
    ]


def test_the_default_is_what_the_report_compares() -> None:
    settings = settings_of(parsed())
    assert {s.label for s in settings} == {
        *("full", "cake", "dynamickv", "snapkv", "pyramidkv", "streamingllm", "uniform", "random")
    }
    assert len(settings) == 1 + 7 * 4


def test_variants_bring_parameters() -> None:
    variants = json.dumps({"cake, faithful": {"method": "cake", "faithful": True}})
    (setting,) = settings_of(parsed("--methods", "", "--budgets", "64", "--variants", variants))
    assert (setting.label, setting.method) == ("cake, faithful", "cake")
    assert (dict(setting.params), setting.budget) == ({"faithful": True}, 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budgets", "0.25,none"), "--budgets: "),
        (("--methods", "cake,cake"), "--methods and --variants: 'cake' is there twice"),
        (("--methods", "full", "--variants", '{"full": {"method": "cake"}}'), "'full' is there"),
        (("--variants", '{"x": {"gamma": 1}}'), "'x' must be an object with a \"method\""),
        (("--methods", ""), "--methods: name at least one"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError) as error:
        settings_of(parsed(*words))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "ruler/nothing"), "there is no task 'ruler/nothing': known are ruler/"),
        (("--tasks", "longbench/qasper"), "longbench/qasper"),
        (("--tasks", "needle", "--data", "nowhere"), "nowhere/ruler/PaulGrahamEssays.json"),
        (("--tasks", "needle", "--lengths", "long"), "--lengths must be whole numbers from 1"),
        (("--tasks", "needle", "--seeds", "-1"), "--seeds must be whole numbers from 0"),
        (("--tasks", "needle", "--lengths", "20"), "needle: the question alone has"),
        (("--tasks", "needle", "--model", str(REPO / "tests")), "has no usable tokenizer"),
    ],
)
def test_a_users_error_is_one_sentence_and_status_2(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", str(MODELS / SMALL), "--output", str(tmp_path), "--prompts", "1")
    data = () if "--data" in words else ("--data", str(REPO / "models"))
    assert main(["eval", *common, *data, *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("kvcompress eval: ")
    assert said in " ".join(errors)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_dry_run_says_how_much_it_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(MODELS / SMALL), "--output", str(tmp_path), "--dry-run"]
    words += ["--data", str(REPO / "models"), "--tasks", "needle", "--lengths", "256,512"]
    words += ["--prompts", "3", "--seeds", "1,2", "--protocol", "both"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "8 cells, 24 prompts of up to 5" in said
    assert "29 settings: 696 answers" in said
    assert not (tmp_path / "results.jsonl").exists()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt is made: what is refused is refused before."""

    def prepare(*_: object) -> list[object]:
        raise AssertionError("work has begun")

    monkeypatch.setattr(run, "prepare", prepare)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("words", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ("", "Not a directory"),
        ("results.jsonl", "Is a directory"),
        ("runs.jsonl", "Is a directory"),
        ("results.md", "Is a directory"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_any_work(
    taken: str, said: str, words: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "out"
    if taken:
        (folder / taken).mkdir(parents=True)
    else:
        folder.write_text("a file")
        folder /= "below"
    given = ["eval", "--model", str(MODELS / SMALL), "--output", str(folder), *words]
    path = folder / taken if taken else folder
    assert refusal(capsys, given) == f"--output: cannot write {path}: {said}"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (b"\xff\n", (), "results.jsonl, line 1, is no result: 'utf-8' codec can't decode"),
        (b"{}\n", (), "results.jsonl, line 1, is no result: "),
        (b"", ("--methods", "cakes"), 'cakes: unknown method "cakes", known are cake, '),
        (b"", ("--budgets", "8"), "cake: kv-compression-budget 8 is too small"),
        (b"", ("--backend", "plain"), "plain vLLM answers with the full cache only"),
        (b"", ("--prompts", "x"), "argument --prompts: must be a whole number of at least 1, got"),
        (b"", ("--prompts", "9" * 5000), "argument --prompts: must be a whole number of at least"),
        (b"", ("--dtype", "float7"), "argument --dtype: invalid choice: 'float7'"),
        (b"", ("--variants", "[" * 9999), "argument --variants: must be a JSON object"),
        (b"", ("--engine-args", '{"zip": 1}'), "--engine-args: vLLM has no argument 'zip'"),
    ],
)
def test_what_shows_at_once_is_refused_before_any_work(
    content: bytes, words: tuple[str, ...], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content:
        (tmp_path / "results.jsonl").write_bytes(content)
    given = ["eval", "--model", str(MODELS / SMALL), "--output", str(tmp_path), *words]
    assert said in refusal(capsys, given)

"""The report's runs: what they come to, how long they take, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import run_report, write_report
from benchmarks.report_runs import BENCHES, EVERYTHING, RUNS, Bench, Run
from tests.support.eval_records import record
from vllm_kvcompress.tools.arguments import split
from vllm_kvcompress.tools.bench.command import make_job
from vllm_kvcompress.tools.cli import build_parser
from vllm_kvcompress.tools.evaluation import tasks
from vllm_kvcompress.tools.evaluation.command import settings_of
from vllm_kvcompress.tools.evaluation.packed_results import pack, read_notes, unpack
from vllm_kvcompress.tools.evaluation.record import Record, Store, read

RUN = Run(
    *("small", "models/m", ("needle",), 512, 3),
    methods=("full", "cake"),
    variants={"cake, even": {"method": "cake", "gamma": 0}},
    budgets=("0.25", "64"),
    about="A few.",
)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run.name))
def test_every_run_is_a_command_that_is_understood(run: Run) -> None:
    args = build_parser().parse_args(run.arguments("out/x"))
    assert len(settings_of(args)) == run.settings
    assert len(tasks.find(split(args.tasks))) == len(run.tasks)
    # Methods were tuned on smaller ones.
    assert args.seeds == str(run.seed)
    assert run.seed >= 100
    labels = [s.label for s in settings_of(args)]
    assert run.notes.get("reference", labels[0]) in labels


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: str(bench.name))
def test_every_benchmark_is_a_command_that_is_understood(bench: Bench) -> None:
    args = build_parser().parse_args(bench.arguments("out/x"))
    assert make_job(args).setups()
    assert bench.name.startswith("bench")  # write_report finds it by that


def test_names_are_used_once_and_ablations_say_what_they_are() -> None:
    names = [run.name for run in EVERYTHING]
    assert len(names) == len(set(names))
    for run in RUNS:
        assert run.name.startswith("ablation") == ("about" in run.notes)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_report, "OUT", tmp_path / "out")
    monkeypatch.setattr(run_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run_report, "PACE", tmp_path / "results" / "pace.csv")
    return tmp_path


def answered(records: list[Record], *calls: dict[str, Any]) -> None:
    """Leave what ``kvcompress eval`` leaves of the run."""
    store = Store(run_report.folder(RUN) / "results.jsonl")
    for one in records:
        store.append(one)
    log = "".join(json.dumps(call) + "\n" for call in calls)
    (run_report.folder(RUN) / "runs.jsonl").write_text(log)


def shown(run: Run | Bench) -> list[str]:
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as capture:
        run_report.show([run], console)
    (row,) = [line for line in capture.get().splitlines() if "small" in line]
    return row.replace("│", " ").split()


def test_a_run_that_was_stopped_is_kept_as_far_as_it_went_and_timed(place: Path) -> None:
    assert RUN.answers == 3 * (1 + 2 * 2)
    assert shown(RUN) == ["small", "15", "15", "?", "0.0"]
    calls = [
        {"answers": 2, "seconds": 1800, "versions": {"vllm": "0.32.0"}, "device": "A x2"},
        {"answers": 1, "seconds": 900, "versions": {"vllm": "0.32.1"}, "device": "B x4"},
    ]
    answered([record(index=index, score=1.0) for index in range(3)], *calls)
    run_report.keep(RUN)
    path = place / "results" / "quality" / "small.csv"
    assert read_notes(path) == {
        "about": "A few.",
        "reference": "cake, even",
        "command": "python -m benchmarks.run_report --only small",
        "versions": "vllm 0.32.1",
        "device": "A x2, B x4",
    }
    assert [r.score for r in unpack(path)] == [1.0, 1.0, 1.0]
    assert run_report.missing(RUN) == 12
    # A quarter of an hour each.
    assert shown(RUN) == ["small", "15", "12", "3.0"]
    # Answers of another machine that were gone on from stay counted as its own.
    answered([], {**calls[1], "device": "C x8"})
    run_report.keep(RUN)
    assert read_notes(path)["device"] == "A x2, B x4, C x8"


def test_settings_are_kept_in_the_order_of_the_run_not_of_the_answers(place: Path) -> None:
    labels = ["cake, even", "of old", "cake", "full"]
    made = [record(label=label, index=index) for index in (0, 1) for label in labels]
    answered(made, {"answers": 8, "seconds": 8, "versions": {}, "device": "A"})
    run_report.keep(RUN)
    kept = [(r.label, r.index) for r in unpack(place / "results" / "quality" / "small.csv")]
    order = ["full", "cake", "cake, even", "of old"]
    assert kept == [(label, index) for label in order for index in (0, 1)]


def test_a_run_goes_on_from_what_is_committed(place: Path) -> None:
    folder = run_report.folder(RUN)
    made = [record(index=0, score=0.5), record(index=1, score=1.0, labels={"depth": 11})]
    path = run_report.committed(RUN)
    path.parent.mkdir(parents=True)
    pack(made, path)
    run_report.take_committed(RUN)
    store = Store(folder / "results.jsonl")
    assert len(store) == 2
    assert all(r.key in store for r in made)
    again = list(read(folder / "results.jsonl"))
    assert [(r.score, r.labels) for r in again] == [(0.5, {}), (1.0, {"depth": 11})]
    # What was answered here comes first, and without a new answer nothing is packed again.
    (folder / "results.jsonl").write_text("")
    run_report.take_committed(RUN)
    assert (folder / "results.jsonl").read_text() == ""
    before = path.read_bytes()
    run_report.keep(RUN)
    assert path.read_bytes() == before


def test_a_benchmark_is_run_once_and_its_rows_are_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench("bench-small", "models/m", ("--rounds", "1"))
    monkeypatch.setattr(run_report, "EVERYTHING", (bench,))
    monkeypatch.setattr(write_report, "main", lambda _: 0)
    calls = []

    def call(run: Run | Bench, _: Path) -> int:
        calls.append(run)
        assert isinstance(run, Bench)
        output = run_report.folder(run)
        output.mkdir(parents=True)
        (output / "bench-small.csv").write_text("case,ratio\nttft,0.9\n")
        return 0

    monkeypatch.setattr(run_report, "execute", call)
    assert shown(bench)[3:] == ["?", "0.5"]
    assert run_report.main([]) == run_report.main([]) == 0
    assert calls == [bench]
    kept = place / "results" / "bench-small.csv"
    assert kept.read_text() == "case,ratio\nttft,0.9\n"
    assert list(run_report._read_paces().index) == ["bench-small"]


def test_a_run_without_an_answer_leaves_nothing(place: Path) -> None:
    run_report.keep(RUN)
    assert list(place.iterdir()) == []


def test_a_run_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_report.main(["--dry-run", "--only", "qwen-9k"])
    assert "there is no run 'qwen-9k': known are qwen-1k," in capsys.readouterr().err

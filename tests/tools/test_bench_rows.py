"""``kvcompress bench``: what rounds say, and the rows in words and on disk."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.bench import command as bench
from vllm_kvcompress.tools.bench.job import BOUND
from vllm_kvcompress.tools.bench.pairs import Paired, take_turns
from vllm_kvcompress.tools.bench.report import BenchReport
from vllm_kvcompress.tools.bench.rows import BUDGET_COLUMNS, COLUMNS, AtBudget, BenchRow, figure


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # The machine was twice as slow in the last round, for both engines.
    times = Paired((10.0, 12.0, 30.0), (5.0, 8.0, 10.0))
    assert times.ratios == (2.0, 1.5, 3.0)
    assert (times.ratio, times.spread, times.medians) == (2.0, (1.5, 3.0), (12.0, 8.0))
    rates = Paired((10.0, 12.0), (20.0, 18.0), more_is_better=True)
    assert rates.ratios == (2.0, 1.5)


@pytest.mark.parametrize(
    ("plain", "compressed", "verdict", "pays"),
    [
        ((2.0, 3.0), (1.0, 1.0), "pays", True),
        ((1.0, 3.0), (1.0, 1.0), "no clear gain", False),
        ((0.9, 1.0), (1.0, 1.0), "does not pay", False),
        ((1.0,), (2.0,), "does not pay (one round)", False),
        ((9.0,), (1.0,), "one round says little", False),
    ],
)
def test_a_gain_is_only_what_every_one_of_several_rounds_shows(
    plain: tuple[float, ...], compressed: tuple[float, ...], verdict: str, pays: bool
) -> None:
    paired = Paired(plain, compressed)
    assert (paired.verdict, paired.pays) == (verdict, pays)


def test_who_goes_first_changes_every_round() -> None:
    calls: list[str] = []

    def measure(name: str) -> int:
        calls.append(name)
        return len(calls)

    told: list[str] = []
    pairs = take_turns(3, ("plain", "ours"), measure, told.append)
    assert calls == ["plain", "ours", "ours", "plain", "plain", "ours"]
    assert pairs == [(1, 2), (4, 3), (5, 6)]
    assert told == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]


SLOWER = BenchRow(
    case="time to first token",
    unit="ms",
    paired=Paired((100.0, 101.0), (120.0, 110.0)),
    prompt=4096,
    bound=1.0,
    blocks=(128, 160),
    notes=("a note",),
)
FASTER = BenchRow(
    case="throughput",
    unit="tokens/s",
    paired=Paired((50.0, 60.0), (100.0, 130.0), more_is_better=True),
    prompt=4096,
    requests=64,
    generated=128,
    pool=BOUND,
    pool_blocks=397,
    blocks=(396, 390),
    running=(3, 19),
    preemptions=(0, 5),
    notes=("a note", "another"),
)


def test_a_row_in_words() -> None:
    assert SLOWER.title == "time to first token, 4,096 tokens"
    assert FASTER.title == "throughput, 64 x 4,096 + 128 tokens, bound pool"
    assert BenchRow("a batch", "s", Paired((1.0,), (1.0,))).title == "a batch"
    assert SLOWER.cells()[1:] == (
        *("100.5 ms", "115 ms", "0.88 (0.83-0.92)", "1.00", "-", "128 -> 160", "-", "does not pay"),
    )
    assert FASTER.cells()[3:] == ("2.08 (2.00-2.17)", "-", "-", "396 -> 390", "3 -> 19", "pays")
    assert [figure(value) for value in (0.012344, 51.239, 123456.7)] == [
        "0.01234",
        "51.24",
        "123457",
    ]


def test_plain_vllm_at_the_budgets_length_stands_beside_a_step() -> None:
    row = replace(SLOWER, at_budget=AtBudget(1024, Paired((23.0, 24.0, 30.0), (25.0, 24.0, 30.0))))
    assert row.cells()[5] == "24 ms (1.00)"
    record = row.record()
    assert [record[name] for name in ("budget_prompt", "budget_plain", "budget_ratio")] == [
        *(1024, "24", "1.000")
    ]
    assert record["budget_rounds"] == "0.920 1.000 1.000"
    assert set(record) >= BUDGET_COLUMNS


def test_files_are_whole_after_each_row(tmp_path: Path) -> None:
    report = BenchReport(tmp_path / "out.v1", {"device": "a GPU", "command": "kvcompress bench"})
    assert list(tmp_path.iterdir()) == []
    report.add(SLOWER)
    report.add(FASTER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.v1.csv", "out.v1.md"]
    with report.csv.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [*COLUMNS, "device", "command"]
    assert first["blocks_plain"] == "128"
    assert first["blocks_compressed"] == "160"
    assert (first["running_plain"], first["pool_blocks"]) == ("", "")
    assert first["verdict"] == "does not pay"
    assert second["plain_spread"] == "50-60"
    assert [second[f"ratio{name}"] for name in ("", "_min", "_max")] == ["2.083", "2.000", "2.167"]
    assert (second["preemptions_compressed"], second["notes"]) == ("5", "a note; another")
    text = report.markdown.read_text(encoding="utf-8")
    # What does not pay stands out, and every row of the table has as many cells as its head.
    assert "**does not pay**" in text
    assert "| pays |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {10}
    assert f"* {SLOWER.title}; {FASTER.title}: a note\n* {FASTER.title}: another\n" in text


def test_a_run_that_is_cut_off_leaves_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(error: type[BaseException]) -> Iterator[BenchRow]:
        yield SLOWER
        raise error("enough")

    assert bench.write(tmp_path / "a", {"model": "m"}, rows(KeyboardInterrupt)) == 130
    assert "stopped; what had been measured is kept" in capsys.readouterr().err
    with pytest.raises(CommandError, match="enough"):
        bench.write(tmp_path / "b", {"model": "m"}, rows(CommandError))
    assert "does not pay" in capsys.readouterr().out
    for name in ("a", "b"):
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == 2
    (tmp_path / "c.csv").mkdir()
    with pytest.raises(CommandError, match=r"cannot write .*c\.csv: Is a directory"):
        bench.write(tmp_path / "c", {"model": "m"}, [SLOWER])

"""The pages: that of a run, and docs/results.md from committed files."""

import re
from pathlib import Path

import pytest

from benchmarks import report_quality, report_speed, write_report
from benchmarks.report_data import read_results
from tests.support.eval_records import answers, measured, needle_grid, small_run
from vllm_kvcompress.tools.bench.pairs import Paired
from vllm_kvcompress.tools.bench.report import BenchReport
from vllm_kvcompress.tools.bench.rows import BenchRow
from vllm_kvcompress.tools.evaluation.markdown_page import write_results
from vllm_kvcompress.tools.evaluation.packed_results import pack, read_notes, unpack
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, Store
from vllm_kvcompress.tools.evaluation.result_groups import by_prompt, paired
from vllm_kvcompress.tools.evaluation.results_frame import make_frame
from vllm_kvcompress.tools.evaluation.tables import MISSING
from vllm_kvcompress.tools.evaluation.task import EvaluationError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A folder like benchmarks/results."""
    folder = tmp_path / "results"
    notes = {"command": "kvcompress eval --tasks ruler", "versions": "vllm 0.32.0"}
    pack(small_run(), folder / "quality" / "ruler.csv", notes)
    more = [*needle_grid(), *measured([2.0, 3.0]), *answers([1, 0], protocol=AGNOSTIC)]
    pack(more, folder / "quality" / "more.csv", notes)
    parts = [*answers([1, 1, 0]), *answers([1, 0, 0], label="cake, gamma 0", params={"gamma": 0})]
    about = {"about": "What the variance is worth.", "reference": "cake, gamma 0"}
    pack(parts, folder / "quality" / "ablation_gamma.csv", about)
    (folder / "engine.csv").write_text(
        "date,model,case,plain_ms,compressed_ms,ratio,spread,note\n"
        "2026-11-22,tiny,ttft,100,120,0.83,0.80-0.90,\n"
        "2026-11-22,tiny,decode,90,60,1.5,1.4-1.6,\n"
        "2026-11-22,tiny,ttft,100,99,1.01,0.97-1.05,\n"
    )
    (folder / "bench_serve.csv").write_text("case,ratio\nserve,1.2\n")
    return folder


def run(committed: Path, *options: str) -> tuple[int, Path]:
    folder = committed.parent / "docs"
    return write_report.main(["--results", str(committed), "--out", str(folder), *options]), folder


def pages(folder: Path) -> dict[str, str]:
    """Text of every page by the name of its section."""
    found = write_report.build(read_results(folder), "results")
    return {Path(path).stem: page.text() for path, page in found.items()}


def test_write_and_check(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, folder = run(committed, "--check")
    assert status == 1
    old = folder / "results" / "of-results-that-are-gone.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    assert run(committed)[0] == 0
    assert not old.exists()
    text = "".join(path.read_text() for path in folder.rglob("*.md"))
    pictures = {path.name for path in (folder / "results").glob("*.png")}
    assert all(f"]({name})" in text for name in pictures)
    assert text.count("![") == len(pictures) >= 5
    linked = set(re.findall(r"\(results/([a-z-]+\.md)\)", (folder / "results.md").read_text()))
    assert linked == {path.name for path in (folder / "results").glob("*.md")}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(committed, "--check")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for page in (folder / "results.md", folder / "results" / "ruler.md"):
        text = page.read_text()
        page.write_text(text + "by hand\n")
        assert run(committed, "--check")[0] == 1
        assert f"{page} is not what the committed results give" in capsys.readouterr().err
        page.write_text(text)
    (folder / "results" / sorted(pictures)[0]).unlink()
    assert run(committed, "--check")[0] == 1
    assert f"lacks {sorted(pictures)[0]}" in capsys.readouterr().err


def test_sections(committed: Path) -> None:
    found = pages(committed)
    ran = found["what-was-run"]
    assert (
        "| ruler | tiny (bfloat16) | 2 of ruler | 1024, 2048 | query-aware | 8; seeds 0, 1 "
        "| kvpress 0.5.5, vllm 0.32.0, vllm_kvcompress 0.1.0 |" in ran
    )
    assert "| file | command | versions |" in ran
    assert "| ruler | kvcompress eval --tasks ruler | vllm 0.32.0 |" in ran
    assert "cake, gamma 0" not in ran
    against = found["kvpress"]
    # Of 4 prompts of a task and seed CAKE has 2.5, SnapKV 1.
    assert "| 1024 | cake | snapkv (kvpress) | 16 | +37.5 [" in against
    assert "* cake against snapkv (kvpress): 4 ahead, 0 level, 0 behind of 4." in against
    ablation = found["ablations"]
    assert "## gamma\n\nWhat the variance is worth." in ablation
    assert "| cake | +33.3 [" in ablation
    agreement = found["full-cache"]
    assert "| vllm_kvcompress 0.1.0, bfloat16 | vllm 0.32.0, bfloat16 | 87.5 [" in agreement
    assert "| 16 | 4 |" in agreement
    assert "query-agnostic" in found["query-agnostic"]
    assert found["needle-grid"].count("![") == 2
    assert "ppl 12.18" in found["likelihood"]
    assert "other-tasks" not in found


def test_tasks_that_lack_answers_are_named(committed: Path) -> None:
    assert "not measured" not in pages(committed)["ruler-per-task"]
    pack(small_run(), committed / "quality" / "ruler.csv", {"not measured": "ruler/qa_1"})
    found = pages(committed)
    assert "* ruler: not measured: ruler/qa_1." in found["ruler-per-task"]
    assert "| file | command | versions | not measured |" in found["what-was-run"]


def test_settings_with_fewer_tasks_are_compared_on_those(committed: Path) -> None:
    lines = [
        *answers([1, 0], task="ruler/vt"),
        *answers([1, 1], task="ruler/cwe"),
        *answers([1, 0], task="ruler/cwe", label="keydiff", method="keydiff"),
        *answers([1, 1], task="ruler/cwe", budget="0.25", kept_tokens=256),
    ]
    pack(lines, committed / "quality" / "ruler.csv")
    text = pages(committed)["ruler"]
    whole, few = text.split("Of the tasks that all settings have (cwe):")
    assert "| keydiff |" not in whole
    assert "Only some of the tasks: keydiff (1 of 2)." in whole
    assert "| cake | 1 of 2 tasks | 75.0 [" in whole
    assert f"| keydiff | {MISSING} | 50.0 [" in few
    assert "| cake | 100.0 [34.2, 100.0] | 100.0 [" in few


def test_speed_says_where_compression_does_not_pay(committed: Path) -> None:
    lines = pages(committed)["speed-and-memory"].splitlines()
    assert "date 2026-11-22, model tiny." in lines
    table = [line for line in lines if line.startswith(("| ttft", "| decode"))]
    assert table == [
        "| ttft | 100 | 120 | 0.83 | 0.80-0.90 | does not pay |",
        "| ttft | 100 | 99 | 1.01 | 0.97-1.05 | within the spread |",
        "| decode | 90 | 60 | 1.5 | 1.4-1.6 | pays |",
    ]
    assert any(line.startswith("Compression pays in 1 of 3 rows, does not") for line in lines)
    assert "| serve | 1.2 | pays, one run |" in lines


def test_rows_of_kvcompress_bench_look_as_on_its_own_page(tmp_path: Path) -> None:
    rows = [
        BenchRow("decode step", "ms", Paired((4.0, 6.0), (2.0, 2.0)), 4096, 8, bound=2.5,
            blocks=(9, 3)),
        BenchRow("throughput", "tokens/s", Paired((4.0,), (3.0,), True), 512, 4, 16, "bound",
            notes=("two preemptions",)),
    ]  # fmt: skip
    report = BenchReport(tmp_path / "bench-tiny", {"device": "A x2", "config": ""})
    for row in rows:
        report.add(row)
    text = pages(tmp_path)["speed-and-memory"]
    table = [line for line in text.splitlines() if line.startswith("| ")]
    own = report.markdown.read_text().splitlines()
    assert [line for line in own if line.startswith("| ")][2:] == table[2:]
    assert table[0].startswith("| case | plain |")
    assert len(table) == 4
    assert "* device: `A x2`" in text
    assert "config" not in text
    assert "* throughput, 4 x 512 + 16 tokens, bound pool: two preemptions" in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"ratio": "1.2"}, "pays"),
        ({"ratio": "0.9"}, "does not pay"),
        ({"ratio": "1.2", "spread": "1.0-1.3"}, "within the spread"),
        ({"ratio": "1.2", "ratio_rounds": "0.9 1.3"}, "within the spread"),
        ({"ratio": "1.2", "spread": "", "ratio_rounds": "1.1 1.3"}, "pays"),
    ],
)
def test_verdict_on_a_ratio(row: dict[str, str], expected: str) -> None:
    assert report_speed.verdict(row) == expected


@pytest.mark.parametrize(
    ("scores", "expected"), [([1, 1, 1, 1], "ahead"), ([0] * 4, "behind"), ([1, 0, 0, 1], "level")]
)
def test_verdict_on_a_difference(scores: list[float], expected: str) -> None:
    others = [0, 1, 1, 0] if expected == "level" else [1.0 - score for score in scores]
    difference = paired(*(by_prompt(make_frame(answers(one))) for one in (scores, others)))
    assert difference is not None
    assert report_quality.verdict(difference) == expected


def test_other_bytes_are_named(committed: Path) -> None:
    records = [
        *answers([1, 1], kept_tokens=160),
        *answers([0, 0], label="snapkv", method="snapkv", source="kvpress 0.5.5"),
    ]
    pack(records, committed / "quality" / "ruler.csv")
    text = pages(committed)["kvpress"]
    assert "ahead; holds 16 % against 12.8 %" in text


def test_sections_without_results_have_no_page(tmp_path: Path) -> None:
    found = pages(tmp_path)
    assert list(found) == ["results"]
    assert "](results/" not in found["results"]


def test_the_committed_page_opens_with_a_table_and_five_sentences() -> None:
    opening, rest = (ROOT / "docs" / "results.md").read_text().split("\n## Contents\n")
    lines = opening.splitlines()
    assert lines[2].startswith("| mean over tasks | 50 % |")
    assert [line.split(" ")[1] for line in lines[5:10]] == [
        *("full", "cake", "dynamickv", "snapkv", "pyramidkv"),
    ]
    assert sum(line.startswith("* ") for line in lines) == 5
    assert MISSING not in opening
    assert "(https://arxiv.org/abs/2503.12491" in rest.split("\n## What papers report\n")[1]


def test_a_file_that_is_none_is_one_sentence(
    committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (committed / "quality" / "bad.csv").write_text("a,b\n")
    assert run(committed)[0] == 2
    assert "bad.csv must have the columns" in capsys.readouterr().err


def test_the_committed_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_report.main(["--check"]) == 0, capsys.readouterr().err


def test_page_of_a_run(tmp_path: Path) -> None:
    records = [*small_run(), *needle_grid(), *measured([2.0, 3.0])]
    store = Store(tmp_path / "results.jsonl")
    for one in records:
        store.append(one)
    versions = {"vllm": "0.32.0", "torch": "2.13.0"}
    written = write_results(tmp_path, command="kvcompress eval x", versions=versions)
    assert all(path.stat().st_size for path in written)
    page = written[0].read_text()
    assert page.startswith("# Results\n\n```sh\nkvcompress eval x\n```\n\nVersions: vllm 0.32.0, ")
    for path in written[2:]:
        assert f"]({path.name})" in page
    assert page.count("![") == len(written) - 2 == 6
    assert "### 1024 tokens, per task" in page
    assert "<details><summary>25 %</summary>" in page
    assert len(unpack(tmp_path / "cells.csv")) == len(records)
    assert read_notes(tmp_path / "cells.csv") == {
        "command": "kvcompress eval x",
        "versions": "vllm 0.32.0, torch 2.13.0",
    }


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"results\.jsonl has no results"):
        write_results(tmp_path, command="", versions={})

"""Cells, their intervals, paired differences and the packed form."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.eval_records import (
    KVPRESS,
    answers,
    full,
    measured,
    needle_grid,
    record,
    small_run,
)
from vllm_kvcompress.tools.evaluation import stats
from vllm_kvcompress.tools.evaluation.cells import average, make_cells, paired
from vllm_kvcompress.tools.evaluation.packed import pack, read_notes, unpack
from vllm_kvcompress.tools.evaluation.task import EvaluationError


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # By hand with z = 1.959964: at 10 of 10 the lower end is n / (n + z^2).
        (10, 10, 10 / 13.841459, 1.0),
        (0, 10, 0.0, 3.841459 / 13.841459),
        (8, 10, 0.490162, 0.943318),
        (50, 100, 0.403832, 0.596168),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    estimate = stats.wilson(right, n)
    assert (estimate.value, estimate.n) == (right / n, n)
    assert estimate.low == pytest.approx(low, abs=1e-6)
    assert estimate.high == pytest.approx(high, abs=1e-6)


def test_bootstrap_is_near_the_normal_interval_and_always_the_same() -> None:
    values = [0.1 * (number % 10) for number in range(200)]
    estimate = stats.mean_score([values])
    spread = 1.96 * math.sqrt(0.0825 / 200)  # the variance of 0, 0.1, ..., 0.9
    assert estimate.value == pytest.approx(0.45)
    assert estimate.low == pytest.approx(0.45 - spread, abs=0.004)
    assert estimate.high == pytest.approx(0.45 + spread, abs=0.004)
    stats._draws.cache_clear()
    assert stats.mean_score([values]) == estimate


def test_tasks_count_alike_whatever_their_number_of_prompts() -> None:
    estimate = stats.mean_score([[1.0], [0.0, 0.0, 0.0]])
    assert (estimate.value, estimate.n) == (0.5, 4)


def test_perfect_tasks_leave_their_wilson_intervals() -> None:
    # Two tasks of 10 right answers: each may be off by 1 - 10 / 13.841459, half of it in the mean.
    estimate = stats.mean_score([[1.0] * 10, [1.0] * 10])
    off = (1 - 10 / 13.841459) / 2 * math.sqrt(2)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(1 - off, abs=1e-6)


def test_no_pair_that_differs_leaves_what_none_of_n_allows() -> None:
    estimate = stats.mean_difference([[0.0] * 10], scores=True)
    assert estimate.value == 0
    assert estimate.high == -estimate.low == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    assert stats.mean_difference([[0.0] * 10], scores=False).high == 0


def test_a_cell_has_all_seeds() -> None:
    records = [*answers([1, 0], seed=1), *answers([1, 1], seed=0, kept_tokens=96)]
    (cell,) = make_cells(records)
    assert cell.prompts == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert list(cell.scores) == [1, 1, 1, 0]
    assert cell.seeds == (0, 1)
    assert [cell.n, cell.prompt_tokens, cell.kept_tokens] == [4, 1000, 112]
    assert cell.share == pytest.approx(0.112)
    assert cell.score == stats.wilson(3, 4)
    assert cell.nll is None
    assert cell.perplexity is None


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    (cell,) = make_cells(measured([1.0, 2.0]))
    assert cell.score is None
    assert cell.nll is not None
    assert cell.nll.value == 1.5
    assert cell.perplexity == pytest.approx(math.exp(1.5))


def test_what_differs_makes_another_cell() -> None:
    first = record()
    changes: list[dict[str, Any]] = [
        *({"model": "other"}, {"dtype": "float32"}, {"source": KVPRESS}, {"task": "ruler/cwe"}),
        *({"length": 2048}, {"protocol": "query-agnostic"}, {"label": "b"}, {"budget": "64"}),
        {"block_size": 64},
    ]
    assert len(make_cells([first, *(replace(first, **change) for change in changes)])) == 10


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (record(), r"seed and index \(0, 0\) are there twice"),
        (record(index=1, params={"gamma": 5}), "the label stands for several settings"),
        (record(None, index=1, nll=2.0), "every prompt must have a score, or every one an nll"),
        (record(None, index=1), "every prompt must have a score, or every one an nll"),
    ],
)
def test_records_that_do_not_fit_are_refused(second: object, message: str) -> None:
    with pytest.raises(EvaluationError, match=f"'cake' at 0.125 on ruler/vt.*{message}"):
        make_cells([record(), second])  # type: ignore[list-item]


def test_paired_takes_the_prompts_that_both_have() -> None:
    ours = make_cells(answers([1, 1, 0, 1]))
    others = make_cells(answers([0, 1, 1], label="snapkv"))
    difference = paired(ours, others)
    assert difference is not None
    assert (difference.pairs, difference.higher, difference.lower) == (3, 1, 1)
    assert difference.estimate.value == 0
    assert difference.estimate.low < -0.5
    assert paired(ours, make_cells(answers([1], seed=9))) is None


def test_paired_counts_tasks_alike() -> None:
    ours = make_cells([*answers([1, 1]), *answers([1] * 8, task="ruler/cwe")])
    others = make_cells([*answers([0, 0]), *answers([1] * 8, task="ruler/cwe")])
    difference = paired(ours, others)
    assert difference is not None
    assert difference.estimate.value == 0.5
    assert average(ours).value == 1


def test_paired_refuses_two_models_and_two_budgets() -> None:
    ours = make_cells(answers([1]))
    with pytest.raises(ValueError, match="one model"):
        paired(ours, make_cells(answers([1], model="other")))
    with pytest.raises(ValueError, match="twice"):
        paired([*ours, *make_cells(answers([1], budget="0.25"))], ours)
    with pytest.raises(ValueError, match="cells with scores"):
        average(make_cells(measured([1.0])))


def test_cells_of_packed_records_are_the_same(tmp_path: Path) -> None:
    records = [
        *small_run(),
        *needle_grid(),
        *measured([2.718281828, 3.1]),
        *answers([1 / 3, 2 / 3, 0.123456789], task="ruler/fwe", params={"b": [1, 2], "a": "x,y"}),
        record(index=7, task="one", prompt_tokens=999, kept_tokens=127),
        record(index=9, task="one", prompt_tokens=1001, kept_tokens=128),
        record(index=10, task="one", prompt_tokens=1001, kept_tokens=128),
    ]
    path = tmp_path / "new" / "cells.csv"
    notes = {"command": "kvcompress eval --tasks a:b", "versions": "vllm 0.32.0"}
    pack(records, path, notes)
    assert set(make_cells(unpack(path))) == set(make_cells(records))
    assert read_notes(path) == notes
    again = tmp_path / "again.csv"
    pack(unpack(path), again, notes)
    assert again.read_bytes() == path.read_bytes()


def test_a_packed_line(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    records = [*answers([1, 0, 1 / 3]), record(0.5, index=5, labels={"depth": 50, "city": "Oslo"})]
    pack(records, path)
    assert path.read_text() == (
        "model,dtype,source,task,length,protocol,seed,label,method,params,budget,block_size,"
        "prompt_tokens,kept_tokens,indices,scores,nlls,depths\n"
        "tiny,bfloat16,vllm_kvcompress 0.1.0,ruler/vt,1024,query-aware,0,cake,cake,{},0.125,32,"
        "1000,128,0-2 5,1 0 0.33333 0.5,,- - - 50\n"
    )
    last = unpack(path)[-1]
    assert (last.index, last.score, last.labels, last.text) == (5, 0.5, {"depth": 50.0}, "")


def test_settings_keep_their_order(tmp_path: Path) -> None:
    records = small_run()
    pack(records, tmp_path / "cells.csv")
    labels = list(dict.fromkeys(r.label for r in unpack(tmp_path / "cells.csv") if r.budget))
    assert labels == ["snapkv", "cake", "random"]  # kvpress's come first, by the name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model,dtype", "model,type", "must have the columns model, dtype"),
        ("1 0 1", "1 0", "line 3, is no packed result: 3 prompts have 2 values"),
        ("0-2", "0-x", "line 3, is no packed result"),
        (",0-2,", ",,", "line 3, is no packed result"),
        (",0-2,1 0 1,,", "", "line 3, is no packed result: it must have 18 columns"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "cells.csv"
    pack(answers([1, 0, 1]), path, {"command": "x"})
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(EvaluationError, match=message):
        unpack(path)


def test_a_missing_file_and_a_note_of_two_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no file .*none\.csv"):
        unpack(tmp_path / "none.csv")
    with pytest.raises(EvaluationError, match="one line"):
        pack(full([1]), tmp_path / "cells.csv", {"command": "a\nb"})


def test_other_prompts_are_no_pairs() -> None:
    ours = make_cells(answers([1, 0], prompt_tokens=714))
    theirs = make_cells(answers([1, 1], source="kvpress 0.5.5", prompt_tokens=715))
    with pytest.raises(EvaluationError, match=r"kvpress 0\.5\.5 were asked other prompts"):
        paired(ours, theirs)
    # Of fewer prompts the mean number of tokens may differ.
    assert paired(ours, make_cells(answers([1], prompt_tokens=715))) is not None

"""Statistics, frames of records, paired differences and the packed form."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
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
from vllm_kvcompress.tools.evaluation.packed_results import pack, read_notes, unpack
from vllm_kvcompress.tools.evaluation.record import Record
from vllm_kvcompress.tools.evaluation.result_groups import Difference, by_prompt, paired
from vllm_kvcompress.tools.evaluation.results_frame import cell_means, make_frame
from vllm_kvcompress.tools.evaluation.task import EvaluationError


def difference(first: list[Record], second: list[Record]) -> Difference | None:
    return paired(by_prompt(make_frame(first)), by_prompt(make_frame(second)))


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
    frame = make_frame([*answers([1, 0], seed=1), *answers([1, 1], seed=0, kept_tokens=96)])
    ordered = by_prompt(frame)["value"]
    assert ordered.to_dict() == {
        ("ruler/vt", seed, index): value
        for seed, index, value in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))
    }
    ((*_, prompts, prompt_tokens, kept_tokens, share),) = cell_means(frame).to_numpy().tolist()
    assert (prompts, prompt_tokens, kept_tokens) == (4, 1000, 112)
    assert share == pytest.approx(0.112)


def test_what_differs_makes_another_cell() -> None:
    first = record()
    changes: list[dict[str, Any]] = [
        *({"model": "other"}, {"dtype": "float32"}, {"source": KVPRESS}, {"task": "ruler/cwe"}),
        *({"length": 2048}, {"protocol": "query-agnostic"}, {"label": "b"}, {"budget": "64"}),
        {"block_size": 64},
    ]
    frame = make_frame([first, *(replace(first, **change) for change in changes)])
    assert len(cell_means(frame)) == 10


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (record(), r"seed and index \(0, 0\) are there twice"),
        (record(index=1, params={"gamma": 5}), "the label stands for several settings"),
        (record(None, index=1, nll=2.0), "every prompt must have a score, or every one an nll"),
        (record(1.0, index=1, nll=2.0), "every prompt must have a score, or every one an nll"),
        (record(None, index=1), "every prompt must have a score, or every one an nll"),
    ],
)
def test_records_that_do_not_fit_are_refused(second: Record, message: str) -> None:
    with pytest.raises(EvaluationError, match=f"'cake' at 0.125 on ruler/vt.*{message}"):
        make_frame([record(), second])


def test_paired_takes_the_prompts_that_both_have() -> None:
    ours = list(answers([1, 1, 0, 1]))
    found = difference(ours, list(answers([0, 1, 1], label="snapkv")))
    assert found is not None
    assert (found.estimate.n, found.higher, found.lower) == (3, 1, 1)
    assert found.estimate.value == 0
    assert found.estimate.low < -0.5
    assert difference(ours, list(answers([1], seed=9))) is None


def test_paired_counts_tasks_alike() -> None:
    ours = [*answers([1, 1]), *answers([1] * 8, task="ruler/cwe")]
    found = difference(ours, [*answers([0, 0]), *answers([1] * 8, task="ruler/cwe")])
    assert found is not None
    assert found.estimate.value == 0.5


def test_other_prompts_are_no_pairs() -> None:
    ours = list(answers([1, 0], prompt_tokens=714))
    with pytest.raises(EvaluationError, match=r"kvpress 0\.5\.5 were asked other prompts"):
        difference(ours, list(answers([1, 1], source="kvpress 0.5.5", prompt_tokens=715)))
    # Of fewer prompts the mean number of tokens may differ.
    assert difference(ours, list(answers([1], prompt_tokens=715))) is not None


def test_frames_of_packed_records_are_the_same(tmp_path: Path) -> None:
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
    before, after = (make_frame(found) for found in (records, unpack(path)))
    for one, other in ((before, after), (cell_means(before), cell_means(after))):
        # Tokens are equal in the mean over a line only.
        compared = [name for name in one if not name.endswith("tokens") or "share" in one]
        order = [name for name in compared if name not in ("value", "share")]
        first, second = (f[compared].sort_values(order, ignore_index=True) for f in (one, other))
        pd.testing.assert_frame_equal(first, second)
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

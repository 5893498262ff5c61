"""Groups and the Markdown tables made from them."""

import pytest

from tests.support.eval_records import KVPRESS, PLAIN, answers, full, measured, small_run
from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, Record
from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, by_length, make_groups
from vllm_kvcompress.tools.evaluation.results_frame import make_frame
from vllm_kvcompress.tools.evaluation.stats import Estimate


def group(*records: Record) -> ResultGroup:
    (only,) = make_groups(make_frame(records))
    return only


def rows(markdown: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in markdown.splitlines()]


def test_panels_by_what_may_be_compared() -> None:
    records = [
        *small_run(),
        *answers([1], protocol=AGNOSTIC),
        *answers([1], task="needle"),
        *measured([2.0]),
        *answers([1], model="another"),
    ]
    groups = make_groups(make_frame(records))
    found = [(p.model, p.protocol, p.family, p.length, p.likelihood) for p in groups]
    assert found == [
        ("another", "query-aware", "ruler", 1024, False),
        ("tiny", "query-aware", "needle", 1024, False),
        ("tiny", "query-aware", "nll", 1024, True),
        ("tiny", "query-aware", "ruler", 1024, False),
        ("tiny", "query-aware", "ruler", 2048, False),
        ("tiny", "query-agnostic", "ruler", 1024, False),
    ]
    assert [len(group) for group in by_length(groups)] == [1, 1, 1, 2, 1]


def test_rows_and_budgets_in_order() -> None:
    shown = make_groups(make_frame(small_run()))[0]
    assert [shown.names[row] for row in shown.rows] == [
        *("full", "full (vllm)", "cake", "random", "snapkv", "snapkv (kvpress)"),
    ]
    assert shown.budgets == ("0.25", "0.125")
    assert shown.tasks == ("ruler/cwe", "ruler/vt")
    assert shown.full == shown.rows[0]


def test_names_of_versions_and_blocks() -> None:
    shown = group(
        *answers([1]),
        *answers([1], source="vllm_kvcompress 0.2.0"),
        *answers([1], block_size=64, source=KVPRESS),
        *full([1], source=PLAIN),
    )
    assert sorted(shown.names.values()) == [
        "cake (kvpress), blocks of 64",
        "cake (vllm_kvcompress 0.1.0), blocks of 32",
        "cake (vllm_kvcompress 0.2.0), blocks of 32",
        "full (vllm)",
    ]


def test_means() -> None:
    shown = group(*full([1, 1, 1, 1]), *answers([1, 1, 1, 0]), *answers([0] * 4, label="random"))
    # Wilson's intervals of 4, 3 and 0 of 4.
    assert rows(tables.means(shown)) == [
        ["ruler/vt", "12.5 %"],
        ["---", "---:"],
        ["*held*", "128 tokens, 12.8 %"],
        ["full", "100.0 [51.0, 100.0]"],
        ["cake", "**75.0** [30.1, 95.4]"],
        ["random", "0.0 [0.0, 49.0]"],
    ]


def test_bold_only_where_the_interval_leaves_out_zero() -> None:
    near = group(*answers([1, 1, 1, 0]), *answers([1, 1, 0, 1], label="snapkv"))
    assert "**" not in tables.means(near)
    assert "**" not in tables.means(group(*answers([1, 1])))
    lower = group(*measured([1.0, 2.0]), *measured([1.1, 2.2], label="snapkv"))
    assert rows(tables.means(lower))[3][1].startswith("**1.500** [1.000, 2.000], ppl 4.48")


def test_one_full_cache_alone() -> None:
    assert rows(tables.means(group(*full([1, 0])))) == [
        ["ruler/vt", "full cache"],
        ["---", "---:"],
        ["full", "50.0 [9.5, 90.5]"],
    ]


def test_tasks() -> None:
    shown = make_groups(make_frame(small_run()))[0]
    table = rows(tables.tasks(shown, "0.125"))
    assert table[0] == [
        *("task, 12.5 %", "full", "cake", "random", "snapkv", "snapkv (kvpress)"),
    ]
    # Eight prompts: 2 of 8 right by Wilson, and none.
    assert table[2][3:] == ["0.0 [0, 32]", "25.0 [7, 59]", "25.0 [7, 59]"]
    assert [line[0] for line in table[2:]] == ["cwe", "vt", "*mean*"]
    assert table[4][2].startswith("62.5 [")


def test_differences() -> None:
    shown = group(
        *full([1, 1, 1, 1]), *answers([1, 1, 0, 0]), *answers([1, 1, 0, 0], label="snapkv")
    )
    reference = shown.rows[-1]
    table = rows(tables.differences(shown, reference))
    # No pair differs: Wilson's upper end of 0 of 4 is 3.841459 / 7.841459.
    assert table == [
        ["minus snapkv, 4 pairs", "12.5 %"],
        ["---", "---:"],
        ["cake", "+0.0 [-49.0, +49.0]"],
    ]
    assert shown.full is not None
    lines = rows(tables.differences(shown, shown.full))
    assert [line[0] for line in lines[2:]] == ["cake", "snapkv"]
    assert lines[2][1].startswith("-50.0 [-100.0, ")


def test_pairs_are_counted_where_they_are_not_all_the_same() -> None:
    shown = group(
        *answers([1, 0]),
        *answers([1, 0], label="snapkv"),
        *answers([1], budget="64"),
        *answers([0], label="snapkv", budget="64"),
    )
    table = rows(tables.differences(shown, shown.rows[1]))
    assert table[0][0] == "minus snapkv"
    assert table[2][1].endswith("2 pairs")
    assert table[2][2].endswith("1 pair")


def test_likelihoods_in_nats() -> None:
    shown = group(*measured([2.0, 3.0], label="full", budget=""), *measured([2.1, 3.2]))
    assert shown.full is not None
    # The perplexity is the exponential of the mean.
    assert "2.500 [2.000, 3.000], ppl 12.18" in tables.means(shown)
    assert rows(tables.differences(shown, shown.full))[2][1] == "+0.150 [+0.100, +0.200]"
    assert "ppl" in tables.header(shown)


def test_header() -> None:
    shown = group(
        *full([1, 0], seed=3), *answers([1, 0], seed=3), *answers([1], seed=4), *answers([1])
    )
    assert tables.header(shown) == (
        "Model tiny, bfloat16. Protocol query-aware: the question is part of what is compressed. "
        "1 task of 1024 tokens (compressed: 1000). 2 to 4 prompts a task, setting and budget, "
        "seeds 0, 3, 4. Blocks of 32 tokens. Answered by vllm_kvcompress 0.1.0."
    )


def test_numbers() -> None:
    assert tables.signed(Estimate(-0.0004, -0.1, 0.0996, 4)) == "+0.0 [-10.0, +10.0]"
    assert tables.budget_text("0.069") == "6.9 %"
    assert tables.budget_text("512") == "512 tokens"
    assert tables.per_cent(0.8125) == "81.2"
    assert tables.seeds_text([6, 5, 5]) == "seeds 5, 6"
    assert tables.seeds_text([0, 1, 2]) == "seeds 0 to 2"


def test_columns_of_numbers_stand_to_the_right() -> None:
    table = tables.table(["a", "b", "c"], [["1", "-2.5", "x|y"], ["2", tables.MISSING, ""]])
    assert table.splitlines() == [
        "| a | b | c |",
        "| --- | ---: | --- |",
        "| 1 | -2.5 | x\\|y |",
        f"| 2 | {tables.MISSING} |  |",
    ]


@pytest.mark.parametrize("kept", [128, 256])
def test_held_spans_what_rows_hold(kept: int) -> None:
    shown = group(*answers([1]), *answers([1], label="snapkv", kept_tokens=kept))
    text = "128 tokens, 12.8 %" if kept == 128 else "128 to 256 tokens, 12.8 to 25.6 %"
    assert tables.held_text(shown, "0.125") == text

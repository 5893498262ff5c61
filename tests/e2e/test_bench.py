"""``kvcompress bench`` as a user starts it, on the small model: structure and blocks, no times."""

import csv
from pathlib import Path

import pytest

from tests.e2e.harness import kvcompress, small_model

pytestmark = pytest.mark.engine

BLOCK, BUDGET = 32, 128
PROMPT, SHORT = 260, 100
HELD = BUDGET // BLOCK
"""Blocks of a compressed prompt."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of the files that a small run wrote."""
    prefix = tmp_path_factory.mktemp("bench") / "out"
    words = ["--model", str(small_model()), "--output", str(prefix), "--budget", str(BUDGET)]
    words += ["--lengths", f"{SHORT},{PROMPT}", "--batches", "2", "--rounds", "2", "--steps", "2"]
    words += ["--cases", "ttft,decode"]
    done = kvcompress("bench", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{prefix}.csv", f"{prefix}.md"]
    assert "kvcompress bench: decode 2 x 260, round 2 of 2" in done.stderr.splitlines()
    return prefix


def rows(prefix: Path) -> dict[tuple[str, int], dict[str, str]]:
    with prefix.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return {(row["case"], int(row["prompt"])): row for row in csv.DictReader(file)}


def test_blocks_are_those_that_the_planner_predicts(prefix: Path) -> None:
    found = rows(prefix)
    assert list(found) == [
        *(("time to first token", SHORT), ("time to first token", PROMPT)),
        *(("decode step", SHORT), ("decode step", PROMPT)),
    ]
    blocks = {key: (r["blocks_plain"], r["blocks_compressed"]) for key, r in found.items()}
    whole, short = -(-PROMPT // BLOCK), -(-SHORT // BLOCK)
    # While a prompt is read in one step, its survivors' blocks are held beside its own.
    assert blocks["time to first token", PROMPT] == (str(whole), str(whole + HELD))
    assert blocks["time to first token", SHORT] == (str(short), str(short))
    # Then only those and one of generated tokens; so few tokens fill no further block of plain's.
    assert blocks["decode step", PROMPT] == (str(2 * whole), str(2 * (HELD + 1)))
    assert blocks["decode step", SHORT] == (str(2 * short), str(2 * short))


def test_every_row_can_be_traced(prefix: Path) -> None:
    for (case, prompt), row in rows(prefix).items():
        low, ratio, high = (float(row[name]) for name in ("ratio_min", "ratio", "ratio_max"))
        assert low <= ratio <= high
        assert len(row["ratio_rounds"].split()) == 2
        assert float(row["plain"]) > 0
        assert row["model"] == small_model().name
        assert (row["method"], row["budget"], row["vllm"][:4]) == ("cake", str(BUDGET), "0.32")
        if case == "decode step":
            assert (row["running_plain"], row["preemptions_plain"]) == ("2", "0")
        compressed = (case, prompt) == ("decode step", PROMPT)
        # What is kept, and the tokens generated until then: a whole prompt's worth is measured.
        assert bool(row["budget_plain"]) == compressed
        if compressed:
            assert HELD * BLOCK < int(row["budget_prompt"]) < HELD * BLOCK + 32
            assert len(row["budget_rounds"].split()) == 2
        # By hand: beside 47.2 MB of weights, 18 and 10 blocks of 32 x 4,608 bytes.
        bound = 1.024 if (case, prompt) == ("decode step", PROMPT) else 1
        assert float(row["byte_bound"]) == bound
    text = prefix.with_suffix(".md").read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 4
    assert "kept whole, so this is what the flag alone costs" in text
    assert "time to first token, 260 tokens: compression took score " in text

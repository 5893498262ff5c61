"""The cost type, and that docs/kernels.md shows what the cost functions say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernel_bench import LLAMA_3_1_8B
from benchmarks.kernel_costs import BANDWIDTH, CONTEXTS, FLOP_RATE, costs, table
from kvcompress_kernels.cost import Cost

ROOT = Path(__file__).resolve().parents[2]


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    cost = Cost(bytes=600, flops=100)
    assert cost.floor_seconds(bandwidth=100.0, flop_rate=50.0) == 6.0
    assert cost.floor_seconds(bandwidth=1000.0, flop_rate=50.0) == 2.0


def test_costs_add_up():
    assert Cost(1, 20) + Cost(300, 4000) == Cost(301, 4020)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_rates_must_be_positive(rates):
    with pytest.raises(ValueError, match="rates must be positive"):
        Cost(1, 1).floor_seconds(*rates)


def test_the_document_has_the_table_that_the_functions_give():
    document = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"\n\n{table()}\n\n" in document


def test_the_documents_shares_of_the_prefill():
    """The sentence under the table, recomputed from the floors."""
    found = []
    for tokens in CONTEXTS.values():
        floors = {
            kernel: cost.floor_seconds(BANDWIDTH, FLOP_RATE)
            for kernel, cost in costs(LLAMA_3_1_8B, tokens).items()
        }
        ours = sum(floors[k] for k in ("scoring", "token scores", "selection", "compaction"))
        found.append(f"{ours / floors['prefill attention, to compare']:.1%}".replace("%", " %"))
    document = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    sentence = f"takes {found[0]} of the prefill's attention at 8k tokens, {found[1]} at 32k and "
    assert f"{sentence}{found[2]} at 128k" in document

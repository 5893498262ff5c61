"""What ``kvcompress inspect`` makes of a cut: shares, bins, passages, texts and arrays."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.inspections import inspection, made
from vllm_kvcompress.eviction.records import make_record
from vllm_kvcompress.methods import LayerInput, get_method
from vllm_kvcompress.tools.inspection.arrays_file import save_arrays
from vllm_kvcompress.tools.inspection.kept_tokens import Run, bin_edges, binned, passages
from vllm_kvcompress.tools.inspection.run import split_text
from vllm_kvcompress.tools.inspection.style import run_title, shorten, strongest

SMALL_RUN = Run(
    request_id="a",
    number=1,
    method="cake",
    prompt_len=6,
    window=2,
    block_size=1,
    kept=(np.array([[0, 4, 5], [1, 4, 5]]), np.array([[0, 1, 2, 4, 5], [0, 1, 3, 4, 5]])),
    stats=(
        {"log_entropy": 1.0, "log_shift": -math.inf},
        {"log_entropy": 1.0 - math.log(4), "log_shift": 3.0},
    ),
    weights=np.array([0.2, 0.8]),
)


# --- numbers -------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    assert SMALL_RUN.counts.tolist() == [[1, 1, 0, 0, 2, 2], [2, 2, 1, 1, 2, 2]]
    assert SMALL_RUN.token_share.tolist() == [0.75, 0.75, 0.25, 0.25, 1, 1]
    assert SMALL_RUN.lengths.tolist() == [3, 5]
    assert SMALL_RUN.mean_length == 4
    assert SMALL_RUN.kept_share == pytest.approx(4 / 6)
    assert run_title(SMALL_RUN) == "cake: 66.7% of the cache, 4 tokens a layer"


def test_profile_is_relative_to_the_largest_layer() -> None:
    assert list(SMALL_RUN.profile) == ["H", "V", "P"]
    assert SMALL_RUN.profile["H"] == pytest.approx([1, 0.25])
    assert SMALL_RUN.profile["V"] == pytest.approx([0, 1])
    assert SMALL_RUN.profile["P"] == pytest.approx([0.25, 1])
    nothing = [{"log_entropy": -math.inf, "log_shift": -math.inf}] * 2
    empty = replace(SMALL_RUN, stats=tuple(nothing), weights=None)
    assert {name: v.tolist() for name, v in empty.profile.items()} == {"H": [0, 0], "V": [0, 0]}
    assert replace(SMALL_RUN, stats=()).profile == {}


@given(st.integers(1, 9000), st.integers(1, 2000))
def test_bins_cover_every_token_once(tokens: int, width: int) -> None:
    edges = bin_edges(tokens, width)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1], len(sizes)) == (0, tokens, min(tokens, width))
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_bins_average_over_tokens_and_heads() -> None:
    assert bin_edges(10, 3).tolist() == [0, 3, 6, 10]
    edges = np.array([0, 4, 6])
    assert binned(SMALL_RUN, edges).tolist() == [[2 / 8, 1], [6 / 8, 1]]
    run = made(1000, 5)
    edges = bin_edges(1000, 300)
    total = (binned(run, edges) * np.diff(edges)).sum(axis=1)
    assert total == pytest.approx(run.lengths)


def test_budgets_in_words() -> None:
    assert inspection().budget_text == "96 tokens a layer"
    assert replace(inspection(), budget=0.125).budget_text == "0.125 of the prompt in a layer"


def test_a_methods_record_becomes_a_run() -> None:
    """What CAKE says of random tensors, recorded by two ranks with a KV head each."""
    method, tokens, layers = get_method("cake", {"window": 8}), 100, 3
    generator = torch.Generator().manual_seed(1)
    scores = [
        method.score(
            LayerInput(
                layer=layer,
                num_layers=layers,
                num_tokens=tokens,
                window=8,
                num_kv_heads=2,
                base=24,
                queries=torch.randn(4, 8, 16, generator=generator),
                keys=torch.randn(2, tokens, 16, generator=generator),
                scale=0.25,
            )
        )
        for layer in range(layers)
    ]
    kept = [method.select(s, 16 + 8 * i) for i, s in enumerate(scores)]
    ranks = [
        make_record(
            method,
            scores,
            [ids[head : head + 1] for ids in kept],
            method.weights(scores, base=24, num_layers=layers),
            request_id="a",
            number=1,
            prompt_len=tokens,
            block_size=8,
        )
        for head in range(2)
    ]
    run = Run.of(ranks)
    assert (run.method, run.num_layers, run.num_heads, run.window) == ("cake", 3, 2, 8)
    assert run.lengths.tolist() == [16, 24, 32]
    for layer, ids in enumerate(kept):
        assert run.counts[layer].sum() == ids.numel()
        assert set(np.flatnonzero(run.counts[layer])) == set(ids.flatten().tolist())
    # P, up to a factor.
    product = run.profile["H"] ** (1 / 1.5) * run.profile["V"] ** (1 / 0.6)
    assert run.profile["P"] == pytest.approx(product / product.max(), rel=1e-5)


# --- text ----------------------------------------------------------------------------------------


def test_pieces_give_the_text_again() -> None:
    text = "a  b\N{GRINNING FACE}c "
    offsets = [(0, 0), (0, 1), (3, 4), (4, 5), (4, 5), (5, 6)]
    names = ["<s>", "a", "b", "x", "y", "c"]
    pieces = split_text(text, offsets, names)
    assert pieces == ["<s>", "a", "  b", "\N{GRINNING FACE}", "", "c "]
    assert "".join(pieces[1:]) == text


def test_passages_are_the_best_kept_ones() -> None:
    kept = np.array([[2, 3, 10, 11, 12, 16, 17, 18, 19]])
    run = Run("a", 1, "x", 20, 1, 4, (kept,), (), None)
    pieces = [" w"] * 20
    found = passages(run, pieces, length=3, count=2)
    assert [(p.start, p.stop) for p in found] == [(1, 4), (10, 13)]
    assert [p.share for p in found] == pytest.approx([2 / 3, 1])
    # The window is kept anyway, so no passage reaches into it; nor does one begin inside a word.
    assert all(p.stop <= 16 for p in passages(run, pieces, length=3, count=9))
    inside = [*pieces[:10], "ord", *pieces[11:]]
    assert 10 not in [p.start for p in passages(run, inside, length=3, count=9)]
    assert [p.start for p in passages(run, pieces, length=3, count=1, margin=11)] == [11]


def test_passages_do_not_overlap_and_know_short_prompts() -> None:
    run = made(500, 3)
    found = passages(run, [" w"] * 500, length=40, count=8)
    assert len(found) == 8
    assert all(a.stop <= b.start for a, b in pairwise(found))
    assert [(p.start, p.stop) for p in passages(run, ["w"] * 500, length=9999, count=3)] == [
        (0, 468)
    ]
    assert passages(replace(run, window=500), ["w"] * 500, length=10, count=3) == []


def test_long_names_are_shortened_in_the_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde\u2026hijk"


def test_marks_span_what_the_history_reaches() -> None:
    shown = inspection(600, 4)
    run = shown.runs[0]
    top = np.quantile(run.token_share[:-32], 0.995)
    assert top <= strongest(shown) < top + 0.1


def test_arrays_hold_everything(tmp_path: Path) -> None:
    shown = inspection(300, 3, 2)
    save_arrays(shown, tmp_path / "raw.data")
    found = np.load(tmp_path / "raw.data")
    meta = json.loads(str(found["meta"]))
    assert [run["method"] for run in meta["runs"]] == ["cake", "dynamickv"]
    assert found["pieces"].tolist() == list(shown.pieces)
    for number, run in enumerate(shown.runs):
        lengths = found[f"{number}_lengths"]
        layers = np.split(found[f"{number}_kept"], np.cumsum(lengths)[:-1], axis=1)
        assert all((a == b).all() for a, b in zip(layers, run.kept, strict=True))
    assert found["0_weights"] == pytest.approx(shown.runs[0].weights)
    assert found["0_log_shift"].tolist() == [0, -1, -2]
    assert found["1_weights"].size == 0

"""Pooling, group mean and deterministic ranking against plain-Python oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_kernels.selection import group_mean, pool_tokens, top_tokens, winners_per_layer

# Few distinct values, so that ties are the rule; both zeros, because -0.0 == 0.0 must be a tie.
tied = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.0, 2.0, -1.5, 1e-40, 3e38])


def rows_of(heads: int, tokens: int) -> st.SearchStrategy[torch.Tensor]:
    line = st.lists(tied, min_size=tokens, max_size=tokens)
    return st.lists(line, min_size=heads, max_size=heads).map(torch.tensor)


@given(
    scores=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=30),
    kernel=st.sampled_from([1, 3, 5, 7]),
    mode=st.sampled_from(["avg", "max"]),
)
def test_pooling(scores, kernel, mode):
    found = pool_tokens(torch.tensor([[scores]]), kernel, mode)
    half = kernel // 2
    for at in range(len(scores)):
        seen = scores[max(0, at - half) : at + half + 1]
        expected = sum(seen) / kernel if mode == "avg" else max(seen)
        assert float(found[0, 0, at]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_pooling_keeps_its_input_and_gives_fp32():
    scores = torch.rand(2, 3, 9).bfloat16()
    before = scores.clone()
    found = pool_tokens(scores, 1, "avg")
    found += 1
    assert found.dtype == torch.float32
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("kernel", "mode", "message"),
    [(4, "avg", "odd"), (0, "avg", "odd"), (-3, "max", "odd"), (5, "mean", "mode")],
)
def test_pooling_refuses(kernel, mode, message):
    with pytest.raises(ValueError, match=message):
        pool_tokens(torch.zeros(2, 8), kernel, mode)


def test_group_mean_averages_neighbouring_query_heads():
    scores = torch.arange(12.0).view(6, 2)
    assert group_mean(scores, 2).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert torch.equal(group_mean(scores, 6), scores)
    with pytest.raises(ValueError, match="cannot be shared"):
        group_mean(scores, 4)


@settings(deadline=None)
@given(data=st.data(), heads=st.integers(1, 3), tokens=st.integers(1, 40))
def test_top_tokens(data, heads, tokens):
    scores = data.draw(rows_of(heads, tokens))
    count = data.draw(st.integers(0, tokens))
    found = top_tokens(scores, count)
    assert found.dtype == torch.int64
    assert found.shape == (heads, count)
    for head in range(heads):
        ranked = sorted((-value, i) for i, value in enumerate(scores[head].tolist()))
        assert found[head].tolist() == sorted(i for _, i in ranked[:count])


def test_smaller_selection_is_part_of_a_larger_one():
    """What lets a cascade cut again and again and end where one cut would have."""
    scores = torch.randint(0, 4, (3, 200), generator=torch.Generator().manual_seed(1)).float()
    larger = top_tokens(scores, 90)
    smaller = top_tokens(scores, 40)
    again = larger.gather(-1, top_tokens(scores.gather(-1, larger), 40))
    assert torch.equal(again, smaller)


@pytest.mark.parametrize("count", [-1, 9])
def test_top_tokens_refuses(count):
    with pytest.raises(ValueError, match="cannot select"):
        top_tokens(torch.zeros(2, 8), count)


def ranked_winners(scores: list[torch.Tensor], k: int) -> list[int]:
    entries = [
        (-value, layer, at)
        for layer, tensor in enumerate(scores)
        for at, value in enumerate(tensor.flatten().tolist())
    ]
    winners = [layer for _, layer, _ in sorted(entries)[:k]]
    return [winners.count(layer) for layer in range(len(scores))]


@settings(deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), heads=st.integers(1, 2))
def test_winners_per_layer_with_ties(data, layers, heads):
    scores = [data.draw(rows_of(heads, data.draw(st.integers(1, 12)))) for _ in range(layers)]
    size = sum(layer.numel() for layer in scores)
    k = data.draw(st.integers(0, size + 3))
    assert winners_per_layer(scores, k).tolist() == ranked_winners(scores, k)


@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_winners_per_layer_is_a_global_top_k(spread):
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randn(2, 300, generator=generator) * spread * (i + 1) for i in range(5)]
    for k in (1, 100, 1500, 2999):
        flat = torch.stack(scores).flatten()
        layer = flat.topk(k).indices // 600
        assert winners_per_layer(scores, k).tolist() == torch.bincount(layer, minlength=5).tolist()


def test_winners_per_layer_takes_everything_if_k_is_large():
    found = winners_per_layer([torch.zeros(2, 3), torch.ones(2, 5)], 17)
    assert found.dtype == np.int64
    assert found.tolist() == [6, 10]
    with pytest.raises(ValueError, match="negative"):
        winners_per_layer([torch.zeros(2, 3)], -1)


def test_infinite_scores_are_ranked():
    scores = [torch.tensor([[-math.inf, 0.0, math.inf]]), torch.tensor([[1.0, -math.inf, 2.0]])]
    assert winners_per_layer(scores, 3).tolist() == [1, 2]
    assert top_tokens(scores[0], 2).tolist() == [[1, 2]]

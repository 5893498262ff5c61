"""Pooling, groups of query heads and deterministic ranking against plain-Python oracles.

Ranking is exact, so Triton, its twin and the oracle are compared for equality.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels import selection_torch
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.selection import (
    grouped,
    pool_tokens,
    select_tokens,
    selection_cost,
    top_tokens,
)
from kvcompress_kernels.winners import winners_per_layer

IMPLEMENTATIONS: list[Implementation] = ["torch", "triton"]

# Few distinct values, so that ties are the rule; both zeros, because -0.0 == 0.0 must be a tie.
tied = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.0, 2.0, -1.5, 1e-40, 3e38])
special = tied | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, -1e-40])


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


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("tokens", [8, 9, 100, 4064])
def test_pooling_is_torchs_own_to_the_last_bit(kernel, tokens):
    scores = torch.rand(3, tokens, generator=torch.Generator().manual_seed(kernel)) ** 3
    size = {"stride": 1, "padding": kernel // 2}
    average = F.avg_pool1d(scores[:, None], kernel, **size)[:, 0]
    largest = F.max_pool1d(scores[:, None], kernel, **size)[:, 0]
    assert torch.equal(pool_tokens(scores, kernel, "avg"), average)
    assert torch.equal(pool_tokens(scores, kernel, "max"), largest)


@given(st.data(), st.integers(1, 3), st.integers(1, 40))
def test_worst_first_is_a_stable_sort(data, heads, tokens):
    some = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-40, 2.0, math.inf, math.nan])
    worth = torch.tensor(
        data.draw(st.lists(some, min_size=heads * tokens, max_size=heads * tokens))
    )
    worth = worth.view(heads, tokens)
    ids = torch.randperm(10**6, generator=torch.Generator().manual_seed(tokens))[: heads * tokens]
    ids = ids.view(heads, tokens).sort().values
    best_first = worth.argsort(dim=1, descending=True, stable=True)
    found = selection_torch.worst_first(ids, worth)
    assert torch.equal(found, ids.gather(1, best_first).flip(1))


def test_neighbouring_query_heads_share_a_kv_head():
    scores = torch.arange(12.0).view(6, 2)
    assert grouped(scores, 2).mean(dim=1).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert torch.equal(grouped(scores, 6)[:, 0], scores)
    with pytest.raises(ValueError, match="cannot be shared"):
        grouped(scores, 4)


@pytest.mark.parametrize("count", [-1, 9])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match="cannot select"):
        top_tokens(torch.zeros(2, 8), count)
    with pytest.raises(ValueError, match="negative"):
        winners_per_layer([torch.zeros(2, 3)], -1)


# From here on: what runs on the device, each against its twin and an oracle.

GUARD = 32  # elements before and after every buffer


def run(function, *arguments, **options):
    """Call with every ``torch.empty`` filled with poison, so that an element left unwritten shows,
    and with a guard on either side that has to stay as it is."""
    real = torch.empty
    guarded = []

    def poisoned(*shape, **kind):
        sizes = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        storage = real(sizes.numel() + 2 * GUARD, **kind)
        poison = math.nan if storage.dtype.is_floating_point else 0x5A5A5A5A
        guarded.append(storage.fill_(poison))
        return storage[GUARD:-GUARD].view(sizes)

    with mock.patch.object(torch, "empty", poisoned):
        result = function(*arguments, **options)
    for storage in guarded:
        edges = torch.stack([storage[:GUARD], storage[-GUARD:]])
        kept = edges.isnan() if edges.dtype.is_floating_point else edges == 0x5A5A5A5A
        assert kept.all()
    return result


def ranked(values: list[float]) -> list[int]:
    """Ids from best to worst: NaN, then by value, then by id. -0.0 and 0.0 compare equal."""
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))


def expected_kept(scores: Tensor, counts) -> list[list[list[int]]]:
    width = max(counts, default=0)
    return [
        [
            sorted(ranked(row)[:count]) + [-1] * (width - count)
            for row in torch.where(job.isnan(), math.nan, job).tolist()
        ]
        for job, count in zip(scores.cpu(), counts, strict=True)
    ]


def check_selection(scores: Tensor, counts: list[int]) -> None:
    """Both implementations give exactly what the oracle does and leave the scores alone."""
    before = scores.cpu().view(torch.int32).clone()
    oracle = expected_kept(scores, counts)
    for implementation in IMPLEMENTATIONS:
        found = run(select_tokens, scores, counts, implementation=implementation)
        assert found.dtype == torch.int32
        assert found.device == scores.device
        assert found.shape == (*scores.shape[:2], max(counts))
        assert found.tolist() == oracle
    assert torch.equal(scores.cpu().view(torch.int32), before)


@settings(max_examples=30)
@given(data=st.data(), jobs=st.integers(1, 3), heads=st.integers(1, 2), tokens=st.integers(1, 24))
def test_select_tokens(device, data, jobs, heads, tokens):
    values = st.lists(special, min_size=jobs * heads * tokens, max_size=jobs * heads * tokens)
    scores = torch.tensor(data.draw(values), device=device).view(jobs, heads, tokens)
    check_selection(scores, [data.draw(st.integers(0, tokens)) for _ in range(jobs)])


@pytest.mark.parametrize("tokens", [1, 2, 1023, 1024, 1025, 4095, 4096, 4097, 8193])
def test_select_tokens_with_ties_at_tile_borders(device, tokens):
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randint(0, 5, (5, 1, tokens), generator=generator).float().to(device)
    check_selection(scores, [0, 1, tokens // 3, tokens - 1, tokens])


@pytest.mark.parametrize("tokens", [1030, 4100])
def test_select_tokens_among_equal_scores(device, tokens):
    """Only the order of ids decides; the last kept one lies before, on and after a tile border."""
    scores = torch.full((5, 2, tokens), 0.25, device=device)
    scores[:, 1] = -math.inf
    border = 1024 if tokens < 4096 else 4096
    counts = [1, border - 1, border, border + 1, tokens]
    check_selection(scores, counts)


@pytest.mark.parametrize("step", [1, 1 << 12, 1 << 23])
def test_select_tokens_tells_neighbouring_numbers_apart(device, step):
    """Scores that differ in the lowest, the middle or the highest digit of the radix alone."""
    count = 200 if step < 1 << 20 else 100
    bits = np.int32(0x3F800000) + np.arange(-count, count, dtype=np.int32) * step
    values = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    values = np.random.default_rng(step).permutation(values)
    scores = torch.from_numpy(values).view(1, 1, -1).repeat(4, 1, 1).to(device)
    check_selection(scores, [1, count // 2, 3 * count, 4 * count - 1])


def test_select_tokens_of_random_bits(device):
    """Every class of number, NaNs of any sign and payload among them."""
    bits = np.random.default_rng(5).integers(-(1 << 31), 1 << 31, (3, 2, 1500)).astype(np.int32)
    bits[:, :, ::7] |= 0x7F800000  # infinities and NaNs of both signs
    bits[:, :, ::5] &= -0x7F800001  # denormals and zeros of both signs
    scores = torch.from_numpy(bits.view(np.float32)).to(device)
    check_selection(scores, [40, 300, 1200])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_select_tokens_reads_strided_scores(device, implementation):
    generator = torch.Generator().manual_seed(6)
    storage = torch.rand(2, 3, 2 * 70, generator=generator).to(device)
    views = [
        storage.transpose(0, 1)[:, :, 7:57],  # heads outside layers
        storage[:1].expand(4, 3, 140)[:, :, 70:],  # a stride of 0
        storage[:, :, 1::2],  # last dimension not contiguous
        storage[:, 1:2],
    ]
    before = storage.clone()
    for scores in views:
        counts = [9 + job for job in range(scores.shape[0])]
        found = run(select_tokens, scores, counts, implementation=implementation)
        assert found.tolist() == expected_kept(scores, counts)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jobs_may_differ_in_length_and_lie_anywhere(device, implementation):
    """What follows a job's history, its window, comes behind the chosen tokens."""
    generator = torch.Generator().manual_seed(3)
    storage = torch.randn(4, 2, 1500, generator=generator).to(device)
    jobs = [storage[0, :, :1200], storage[1, :, 7:40], storage[2].T[:2, :], storage[3]]
    counts, tails = [33, 0, 2, 1500], [5, 3, 0, 4]
    found = select_tokens(jobs, counts, tails=tails, implementation=implementation)
    assert found.shape == (4, 2, 1504)
    for own, job, count, tail in zip(found.tolist(), jobs, counts, tails, strict=True):
        (expected,) = expected_kept(job[None], [count])
        window = list(range(job.shape[1], job.shape[1] + tail))
        rest = [-1] * (1504 - count - tail)
        assert own == [chosen + window + rest for chosen in expected]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shapes_may_be_empty(device, implementation):
    for shape, none in [
        ((2, 1, 3), [0, 0]),
        ((2, 0, 3), [2, 1]),
        ((0, 4, 3), []),
        ((1, 1, 0), [0]),
    ]:
        empty = torch.zeros(shape, device=device)
        found = select_tokens(empty, none, implementation=implementation)
        assert found.shape == (*shape[:2], max(none, default=0))


@pytest.mark.parametrize(
    ("shape", "dtype", "counts", "message"),
    [
        ((2, 8), torch.float32, [1, 1], "scores must be"),
        ((1, 2, 8), torch.float64, [1], "scores must be"),
        ((1, 2, 8), torch.float32, [1, 1], "do not fit"),
        ((1, 2, 8), torch.float32, [-1], "cannot select"),
        ((2, 2, 5), torch.float32, [3, 6], "cannot select 6 of 5"),
    ],
)
def test_select_tokens_refuses(shape, dtype, counts, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(torch.zeros(shape, dtype=dtype), counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_tokens_on_the_device(device, dtype):
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    expected = expected_kept(scores.float()[None], [60])[0]
    for implementation in ("auto", "triton", "torch"):
        found = top_tokens(scores, 60, implementation=implementation)
        assert found.dtype == torch.int64
        assert found.tolist() == expected
    assert selection_torch._top_sorted(scores, 60).tolist() == expected


def check_winners(scores: list[Tensor], k: int) -> None:
    entries = [v for layer in scores for v in torch.where(layer.isnan(), math.nan, layer).tolist()]
    flat = [value for row in entries for value in (row if isinstance(row, list) else [row])]
    owner = [layer for layer, each in enumerate(scores) for _ in range(each.numel())]
    expected = [0] * len(scores)
    for entry in ranked([float(value) for value in flat])[:k]:
        expected[owner[entry]] += 1
    for implementation in IMPLEMENTATIONS:
        found = run(winners_per_layer, scores, k, implementation=implementation)
        assert found.dtype == np.dtype(np.int64)
        assert found.tolist() == expected
    if 0 < k < len(flat):
        assert selection_torch.winners_torch(scores, k).tolist() == expected


@settings(max_examples=30)
@given(data=st.data(), layers=st.integers(1, 4), heads=st.integers(1, 2))
def test_winners_per_layer_on_the_device(device, data, layers, heads):
    scores = []
    for _ in range(layers):
        tokens = data.draw(st.integers(1, 12))
        values = data.draw(st.lists(special, min_size=heads * tokens, max_size=heads * tokens))
        scores.append(torch.tensor(values, device=device).view(heads, tokens))
    check_winners(scores, data.draw(st.integers(0, sum(layer.numel() for layer in scores) + 2)))


@pytest.mark.parametrize("tokens", [1023, 1025, 4097, 16384, 16385])
def test_winners_per_layer_at_tile_borders(device, tokens):
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randint(0, 9, (3, 1, tokens), generator=generator).float().to(device)
    scores[1] *= 1e-6
    for k in (1, tokens + 7, 3 * tokens - 1):
        check_winners(list(scores), k)


def test_winners_per_layer_takes_layers_wherever_they_lie(device):
    """Views of one tensor, transposed ones, half types, other lengths and numbers of heads."""
    generator = torch.Generator().manual_seed(8)
    storage = torch.randn(4, 6, 150, generator=generator).to(device)
    storage[1] *= 1e-30
    storage[3] *= 1e30
    before = storage.clone()
    scores = [
        storage[0, :, 3:90],
        storage[1:3, 2],
        storage[3, :, :6].T,
        storage[0].bfloat16(),
        storage[2, :1].half(),
    ]
    for k in (1, 333, 1500):
        check_winners(scores, k)
    assert torch.equal(storage, before)


def test_cost_counts_every_operand_once():
    cost = selection_cost(jobs=2, heads=3, tokens=100, count=10)
    assert (cost.bytes, cost.flops) == (4 * 6 * 110, 0)

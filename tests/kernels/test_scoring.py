"""Window statistics against a float64 oracle that holds everything at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels import scoring_torch
from kvcompress_kernels.scoring import WindowStatistics, scoring_cost, window_statistics

# The arithmetic is fp32 whatever the input; inputs are rounded before the oracle sees them, so the
# tolerances are those of fp32 sums and do not widen for half precision.
TOLERANCE = {
    # dtype: (atol, rtol)
    torch.float32: (1e-7, 2e-5),
    torch.float16: (1e-7, 2e-5),
    torch.bfloat16: (1e-7, 2e-5),
}


def oracle(
    queries: Tensor,
    keys: Tensor,
    window: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, float, float]:
    heads, count, _ = queries.shape
    tokens = keys.shape[1]
    k = keys.double().repeat_interleave(heads // keys.shape[0], dim=0)
    logits = queries.double() @ k.transpose(-1, -2) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    own = torch.arange(tokens - count, tokens)
    logits = logits.masked_fill(torch.arange(tokens)[None] > own[:, None], -math.inf)
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(heads, count, 1)
        logits = torch.cat((logits, extra), dim=-1)
    p = logits.softmax(dim=-1)[..., : tokens - window]
    var = p.var(dim=1) if count > 1 else torch.zeros_like(p[:, 0])
    return p.mean(dim=1), var, float(-torch.xlogy(p, p).sum()), float(var.sum())


def check(found: WindowStatistics, expected: tuple[Tensor, Tensor, float, float], dtype) -> None:
    atol, rtol = TOLERANCE[dtype]
    mean, var, entropy, shift = expected
    assert found.mean.dtype == found.var.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), mean, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.var.double(), var, atol=atol, rtol=rtol)
    assert found.entropy == pytest.approx(entropy, rel=rtol, abs=1e-5)
    assert found.shift == pytest.approx(shift, rel=rtol, abs=1e-9)


def random_case(heads, kv_heads, count, tokens, dim, dtype, peak=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, count, dim, generator=generator) * peak
    keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    return queries.to(dtype), keys.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 4), (3, 2), (7, 2)])
def test_against_oracle(dtype, dim, group, kv_heads):
    queries, keys = random_case(group * kv_heads, kv_heads, 32, 700, dim, dtype)
    found = window_statistics(queries, keys, window=32, scale=dim**-0.5)
    check(found, oracle(queries, keys, 32, dim**-0.5), dtype)


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 3, 7]),
    kv_heads=st.integers(1, 3),
    window=st.integers(1, 32),
    short=st.integers(0, 31),
    history=st.integers(1, 1200),
    dim=st.sampled_from([8, 64, 80]),
    peak=st.sampled_from([0.0, 1.0, 30.0]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes(group, kv_heads, window, short, history, dim, peak, soft_cap, with_sinks, seed):
    """Fewer queries than the window, one history token, soft cap, sinks, flat and peaked rows."""
    count = max(1, window - short)
    heads, tokens = group * kv_heads, history + window
    queries, keys = random_case(heads, kv_heads, count, tokens, dim, torch.float32, peak, seed)
    sinks = torch.linspace(-2, 4, heads) if with_sinks else None
    kwargs = {"soft_cap": soft_cap, "sinks": sinks}
    found = window_statistics(queries, keys, window=window, scale=dim**-0.5, **kwargs)
    assert found.mean.shape == found.var.shape == (heads, history)
    mean, var, entropy, shift = oracle(queries, keys, window, dim**-0.5, **kwargs)
    # Logits up to a few hundred: their fp32 rounding alone is a relative 1e-4 of a probability.
    torch.testing.assert_close(found.mean.double(), mean, atol=1e-6, rtol=5e-4)
    torch.testing.assert_close(found.var.double(), var, atol=1e-6, rtol=1e-3)
    assert found.entropy == pytest.approx(entropy, rel=5e-4, abs=1e-4)
    assert found.shift == pytest.approx(shift, rel=1e-3, abs=1e-7)


def test_rows_with_a_single_winner_have_no_entropy():
    """Probabilities of exactly 0 and 1, logits thousands apart: finite, and zero entropy."""
    keys = torch.zeros(1, 50, 8)
    keys[0, 3, 0] = 1.0
    queries = torch.zeros(2, 4, 8)
    queries[..., 0] = 1.0e5
    found = window_statistics(queries, keys, window=4, scale=1.0)
    assert found.entropy == pytest.approx(0.0, abs=1e-6)
    assert found.shift == 0.0
    assert found.mean[:, 3].tolist() == [1.0, 1.0]
    assert float(found.mean.sum()) == 2.0


def test_attention_inside_the_window_leaves_nothing_for_the_history():
    keys = torch.zeros(1, 40, 4)
    keys[0, -8:, 0] = 1.0
    queries = torch.zeros(1, 8, 4)
    queries[..., 0] = 1.0e5
    found = window_statistics(queries, keys, window=8, scale=1.0)
    assert float(found.mean.sum()) == 0.0
    assert found.entropy == 0.0


def test_minus_infinity_logits_do_not_poison_the_sums():
    queries, keys = random_case(2, 1, 4, 60, 8, torch.float32)
    keys[0, 5] = torch.tensor([-math.inf] + [0.0] * 7)
    queries[..., 0] = queries[..., 0].abs() + 0.1
    found = window_statistics(queries, keys, window=4, scale=1.0)
    assert math.isfinite(found.entropy)
    assert found.mean[:, 5].tolist() == [0.0, 0.0]


def test_one_query_has_no_variance():
    queries, keys = random_case(6, 2, 1, 90, 64, torch.float32)
    found = window_statistics(queries, keys, window=1, scale=0.125)
    assert found.shift == 0.0
    assert not found.var.any()


def test_a_sink_takes_mass_from_the_history():
    queries, keys = random_case(4, 2, 8, 100, 16, torch.float32)
    without = window_statistics(queries, keys, window=8, scale=0.25)
    swallowed = window_statistics(queries, keys, window=8, scale=0.25, sinks=torch.full((4,), 50.0))
    assert float(swallowed.mean.sum()) < 1e-12 < float(without.mean.sum())


def test_result_does_not_depend_on_how_columns_are_blocked(monkeypatch):
    queries, keys = random_case(6, 2, 16, 500, 32, torch.float32)
    whole = window_statistics(queries, keys, window=16, scale=0.2)
    monkeypatch.setattr(scoring_torch, "_BLOCK_CPU", 37)
    kept = window_statistics(queries, keys, window=16, scale=0.2)
    monkeypatch.setattr(scoring_torch, "_KEEP_LOGITS", 0)
    again = window_statistics(queries, keys, window=16, scale=0.2)
    torch.testing.assert_close(kept.mean, whole.mean, atol=1e-8, rtol=1e-5)
    assert torch.equal(again.mean, kept.mean)
    assert torch.equal(again.var, kept.var)
    assert again.entropy == kept.entropy == pytest.approx(whole.entropy, rel=1e-6)


def test_inputs_are_left_alone():
    queries, keys = random_case(4, 2, 8, 70, 16, torch.float32)
    before = queries.clone(), keys.clone()
    window_statistics(queries, keys, window=8, scale=0.25, soft_cap=3.0, sinks=torch.ones(4))
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


def test_strided_keys_are_read_correctly():
    """Engines hand over [S, N, D] storage as a transposed view."""
    queries, keys = random_case(4, 2, 8, 70, 16, torch.float32)
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    expected = window_statistics(queries, keys, window=8, scale=0.25)
    found = window_statistics(queries, strided, window=8, scale=0.25)
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "window", "message"),
    [
        ((4, 8, 16), (2, 40, 8), 8, "head size"),
        ((4, 8, 16), (3, 40, 16), 8, "cannot be shared"),
        ((4, 9, 16), (2, 40, 16), 8, "1 to window"),
        ((4, 0, 16), (2, 40, 16), 8, "1 to window"),
        ((4, 8, 16), (2, 8, 16), 8, "no token lies before"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(queries, keys, window, message):
    with pytest.raises(ValueError, match=message):
        window_statistics(torch.zeros(queries), torch.zeros(keys), window=window, scale=1.0)


def test_sinks_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="sinks must have shape"):
        window_statistics(
            torch.zeros(4, 8, 16), torch.zeros(2, 40, 16), window=8, scale=1.0, sinks=torch.ones(3)
        )


def test_cost_counts_two_reads_of_the_keys():
    cost = scoring_cost(1000, heads=8, kv_heads=2, head_size=64, window=32, itemsize=2)
    assert cost.bytes == 2 * 1000 * 2 * 64 * 2 + 8 * 32 * 64 * 2 + 2 * 8 * 968 * 4
    assert cost.flops == 2 * (2 * 8 * 32 * 1000 * 64)

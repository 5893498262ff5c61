"""Window statistics against a float64 oracle that holds everything at once.

What the torch version does with sinks, peaks and infinite logits: tests/kernels/test_scoring_paged.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels import scoring_torch
from kvcompress_kernels.scoring import scoring_cost, window_statistics


def oracle(
    queries: Tensor,
    keys: Tensor,
    window: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, float, float, Tensor]:
    """Mean, variance, entropy, shift and the last query's row."""
    heads, count, _ = queries.shape
    tokens = keys.shape[1]
    k = keys.double().repeat_interleave(heads // keys.shape[0], dim=0)
    logits = queries.double() @ k.transpose(-1, -2) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    position = torch.arange(tokens, device=keys.device)
    logits = logits.masked_fill(position > position[-count:, None], -math.inf)
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(heads, count, 1)
        logits = torch.cat((logits, extra), dim=-1)
    p = logits.softmax(dim=-1)[..., : tokens - window]
    var = p.var(dim=1) if count > 1 else torch.zeros_like(p[:, 0])
    return p.mean(dim=1), var, float(-torch.xlogy(p, p).sum()), float(var.sum()), p[:, -1]


def random_case(heads, kv_heads, count, tokens, dim, dtype, peak=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, count, dim, generator=generator) * peak
    keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    return queries.to(dtype), keys.to(dtype)


@settings(max_examples=40)
@given(
    group=st.sampled_from([1, 3, 7]),
    kv_heads=st.integers(1, 3),
    window=st.integers(1, 32),
    short=st.integers(0, 31),
    history=st.integers(1, 1200),
    dim=st.sampled_from([8, 64, 80, 96]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    peak=st.sampled_from([0.0, 1.0, 30.0]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_the_oracle(
    group, kv_heads, window, short, history, dim, dtype, peak, soft_cap, with_sinks, seed
):
    """Fewer queries than the window, one history token, soft cap, sinks, flat and peaked rows."""
    count = max(1, window - short)
    heads, tokens = group * kv_heads, history + window
    queries, keys = random_case(heads, kv_heads, count, tokens, dim, dtype, peak, seed)
    sinks = torch.linspace(-2, 4, heads) if with_sinks else None
    kwargs = {"soft_cap": soft_cap, "sinks": sinks}
    found = window_statistics(queries, keys, window=window, scale=dim**-0.5, **kwargs)
    before = random_case(heads, kv_heads, count, tokens, dim, dtype, peak, seed)
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])
    assert found.mean.shape == found.var.shape == (heads, history)
    assert found.mean.dtype == found.var.dtype == torch.float32
    mean, var, entropy, shift, _ = oracle(queries, keys, window, dim**-0.5, **kwargs)
    # Inputs are rounded before the oracle sees them, so tolerances are those of fp32 sums whatever
    # their type. Logits of a few hundred: their rounding alone is 1e-4 of a probability.
    atol, rtol = (1e-7, 2e-5) if peak <= 1.0 else (1e-6, 1e-3)
    torch.testing.assert_close(found.mean.double(), mean, atol=atol, rtol=rtol)
    torch.testing.assert_close(found.var.double(), var, atol=atol, rtol=rtol)
    assert found.entropy == pytest.approx(entropy, rel=rtol, abs=1e-4)
    assert found.shift == pytest.approx(shift, rel=rtol, abs=1e-7)


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


@pytest.mark.parametrize(
    ("queries", "keys", "sinks", "message"),
    [
        ((4, 8, 16), (2, 40, 8), None, "head size"),
        ((4, 8, 16), (3, 40, 16), None, "cannot be shared"),
        ((4, 9, 16), (2, 40, 16), None, "1 to window"),
        ((4, 0, 16), (2, 40, 16), None, "1 to window"),
        ((4, 8, 16), (2, 8, 16), None, "no token lies before"),
        ((4, 8, 16), (2, 40, 16), torch.ones(3), "sinks must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(queries, keys, sinks, message):
    with pytest.raises(ValueError, match=message):
        window_statistics(torch.zeros(queries), torch.zeros(keys), window=8, scale=1.0, sinks=sinks)


def test_cost_counts_two_reads_of_the_keys():
    cost = scoring_cost(1000, heads=8, kv_heads=2, head_size=64, window=32, itemsize=2)
    assert cost.bytes == 2 * 1000 * 2 * 64 * 2 + 8 * 32 * 64 * 2 + 2 * 8 * 968 * 4
    assert cost.flops == 2 * (2 * 8 * 32 * 1000 * 64)

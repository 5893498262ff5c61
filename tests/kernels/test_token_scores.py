"""The fused indicator, pooling and reduction over heads against a float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress_kernels.selection import grouped, pool_tokens, token_scores, token_scores_cost
from tests.kernels.test_selection import IMPLEMENTATIONS, run

OPTIONS: dict[str, Any] = {"gamma": 2.0, "kernel": 5, "mode": "avg", "num_kv_heads": 2}


def expected_scores(mean, var, gamma, kernel, mode, num_kv_heads, reduce) -> Tensor:
    """Float64, one token at a time."""
    values = mean.double().cpu() if var is None else (mean.double() + gamma * var.double()).cpu()
    jobs, query_heads, tokens = values.shape
    pooled = torch.zeros_like(values)
    for at in range(tokens):
        seen = values[:, :, max(0, at - kernel // 2) : at + kernel // 2 + 1]
        pooled[:, :, at] = seen.sum(-1) / kernel if mode == "avg" else seen.amax(-1)
    groups = pooled.view(jobs, num_kv_heads, query_heads // num_kv_heads, tokens)
    return groups.mean(2) if reduce == "mean" else groups.amax(2)


def statistics(jobs: int, heads: int, tokens: int, device, seed: int = 9) -> tuple[Tensor, Tensor]:
    """Mean and variance as they come out of a softmax: >= 0, over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(jobs, heads, tokens, generator=generator).pow(6)
    return mean.to(device), torch.rand(jobs, heads, tokens, generator=generator).pow(9).to(device)


def check_scores(mean, var, **changed) -> None:
    """Both implementations agree with the oracle and the inputs stay as they are."""
    options = {**OPTIONS, "reduce": "mean", **changed}
    before = [each.clone() for each in (mean, var) if each is not None]
    expected = expected_scores(mean, var, **options).float()
    for implementation in IMPLEMENTATIONS:
        found = run(token_scores, mean, var, implementation=implementation, **options)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        # Sums of some forty numbers >= 0.
        torch.testing.assert_close(found.cpu(), expected, atol=0.0, rtol=5e-6)
    for each, old in zip((mean, var), before, strict=False):
        assert torch.equal(each.view(torch.int32), old.view(torch.int32))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_token_scores(device, group, kernel, mode, reduce):
    mean, var = statistics(2, 2 * group, 70, device)
    check_scores(mean, var, gamma=200.0, kernel=kernel, mode=mode, reduce=reduce)
    check_scores(mean, None, kernel=kernel, mode=mode, reduce=reduce)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_token_scores_of_jobs_of_different_length(device, mode, reduce):
    """Each is scored as if it were alone, whatever lies behind its tokens."""
    mean, var = statistics(3, 4, 50, device)
    counts = [50, 7, 31]
    for job, count in enumerate(counts):
        mean[job, :, count:], var[job, :, count:] = math.nan, math.inf
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    options = {**OPTIONS, "mode": mode, "reduce": reduce}
    for implementation in IMPLEMENTATIONS:
        found = token_scores(mean, var, lengths=lengths, implementation=implementation, **options)
        for job, count in enumerate(counts):
            own = mean[job : job + 1, :, :count], var[job : job + 1, :, :count]
            expected = expected_scores(*own, **options).float()[0]
            torch.testing.assert_close(found[job, :, :count].cpu(), expected, atol=0.0, rtol=5e-6)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("tokens", [1, 2, 1019, 1020, 1021, 1024, 2041])
def test_token_scores_at_tile_borders(device, tokens, mode):
    """A tile has 1024 columns, of which 1020 are its own at width 5."""
    mean, var = statistics(1, 2, tokens, device)
    check_scores(mean, var, mode=mode, num_kv_heads=1)


@pytest.mark.parametrize(("kernel", "tokens"), [(63, 40), (401, 1500)])
def test_token_scores_of_wide_kernels(device, kernel, tokens):
    mean, _ = statistics(1, 2, tokens, device)
    expected = expected_scores(mean, None, 0.0, kernel, "avg", 2, "mean").float()
    for implementation in IMPLEMENTATIONS:
        found = token_scores(
            mean, None, implementation=implementation, **{**OPTIONS, "kernel": kernel}
        )
        torch.testing.assert_close(found.cpu(), expected, atol=0.0, rtol=5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_max_pooling_ignores_what_is_outside(device, implementation):
    """Zeros there would win over negative scores."""
    scores = -torch.arange(1.0, 13.0, device=device).view(2, 1, 6)
    options = {**OPTIONS, "kernel": 3, "mode": "max", "num_kv_heads": 1}
    found = token_scores(scores, None, implementation=implementation, **options)
    assert found[:, 0].tolist() == [[-1, -1, -2, -3, -4, -5], [-7, -7, -8, -9, -10, -11]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_nan_scores_spread_as_far_as_the_kernel(device, implementation, mode):
    scores = torch.ones(4, 20, device=device)
    scores[1, 9] = math.nan
    options = {**OPTIONS, "mode": mode, "reduce": "max"}
    found = token_scores(scores, None, implementation=implementation, **options)
    assert found.isnan().nonzero().tolist() == [[0, at] for at in range(7, 12)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_token_scores_takes_any_leading_dimensions_and_strides(device, implementation):
    mean, var = statistics(6, 4, 64, device)
    options = {**OPTIONS, "implementation": implementation}
    whole = token_scores(mean, var, **options)
    assert torch.equal(token_scores(mean[3], var[3], **options), whole[3])
    deep = token_scores(mean.view(2, 3, 4, 64), var.view(2, 3, 4, 64), **options)
    assert torch.equal(deep, whole.view(2, 3, 2, 64))
    assert torch.equal(
        token_scores(mean[::2], var[1::2].clone(), **options)[1:],
        (token_scores(mean[2::2].clone(), var[3::2], **options)),
    )
    swapped = mean.transpose(0, 1).contiguous().transpose(0, 1)
    columns = var.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(token_scores(swapped, columns, **options), whole)
    assert token_scores(mean[:0], var[:0], **options).shape == (0, 2, 64)
    options["kernel"] = 1
    found = token_scores(swapped, None, **options)
    assert found.is_contiguous()
    assert torch.equal(found, token_scores(mean, None, **options))


def test_token_scores_on_the_cpu_are_the_composition():
    mean, var = statistics(1, 6, 300, "cpu")
    options: dict[str, Any] = {"kernel": 7, "mode": "max", "num_kv_heads": 3}
    expected = grouped(pool_tokens(mean[0].add(var[0], alpha=4.0), 7, "max"), 3).mean(dim=1)
    assert torch.equal(token_scores(mean[0], var[0], gamma=4.0, **options), expected)
    plain = grouped(pool_tokens(mean[0], 7, "max"), 3).mean(dim=1)
    ignored = torch.full_like(var[0], math.nan)
    assert torch.equal(token_scores(mean[0], ignored, gamma=0.0, **options), plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": 4}, "odd"),
        ({"mode": "mean"}, "mode"),
        ({"reduce": "sum"}, "reduced"),
        ({"num_kv_heads": 3}, "cannot be shared"),
        ({"num_kv_heads": 0}, "cannot be shared"),
        ({"var": torch.zeros(2, 4, 7)}, "var must be"),
        ({"mean": torch.zeros(2, 4, 8).half()}, "mean must be"),
        ({"implementation": "cuda"}, "implementation must be"),
    ],
)
def test_token_scores_refuses(changed, message):
    given = {**OPTIONS, "mean": torch.zeros(2, 4, 8), "var": torch.zeros(2, 4, 8)}
    with pytest.raises(ValueError, match=message):
        token_scores(**(given | changed))


def test_cost_counts_every_operand_once():
    shape = {"jobs": 2, "heads": 8, "kv_heads": 2, "tokens": 100, "kernel": 5}
    with_var = token_scores_cost(**shape, has_var=True)
    assert (with_var.bytes, with_var.flops) == (4 * (2 * 1600 + 400), 3 * 1600 + 5 * 400)
    without = token_scores_cost(**shape, has_var=False)
    assert (without.bytes, without.flops) == (4 * (1600 + 400), 1600 + 5 * 400)

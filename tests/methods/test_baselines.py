"""The baselines: what each keeps of small inputs, worked out in another way."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels.scoring import paged_window_statistics, window_statistics
from tests.support.budgets import page_budgets, token_budgets
from tests.support.layers import DIM, HEADS, KV_HEADS, random_layer, score_random
from vllm_kvcompress.methods import (
    H2O,
    KeyDiff,
    Knorm,
    LayerInput,
    LayerScores,
    Method,
    Need,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    Tova,
    Uniform,
    available,
    get_method,
    to_numbers,
)

TOKENS = 90
layer_of = partial(random_layer, tokens=TOKENS)

SCORING = [name for name in available() if not get_method(name, {}).scorer.keeps_all]
WAYS = {name: get_method(name, {"window": 8}) for name in SCORING} | {
    f"{name}-faithful": get_method(name, {"window": 8, "faithful": True})
    for name in ("cake", "dynamickv")
}
every_way = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS.keys())


def attention(layer: LayerInput) -> Tensor:
    """Causal attention of the window's queries, fp64 [H, w, S], all at once."""
    assert layer.queries is not None
    assert layer.keys is not None
    group = len(layer.queries) // layer.num_kv_heads
    keys = layer.keys.double().repeat_interleave(group, dim=0)
    logits = layer.queries.double() @ keys.transpose(1, 2) * layer.scale
    count, tokens = logits.shape[1:]
    future = torch.ones(count, tokens, dtype=torch.bool).triu(tokens - count + 1)
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


def by_group(per_head: Tensor) -> Tensor:
    return per_head.view(KV_HEADS, HEADS // KV_HEADS, -1)


# ---------------------------------------------------------------------- where a layer comes from


@every_way
def test_keys_may_be_given_or_read(method: Method) -> None:
    given = layer_of(method)
    keys = given.keys
    assert keys is not None
    read = []

    def read_keys() -> Tensor:
        read.append(True)
        return keys

    from_cache = replace(given, keys=None, read_keys=read_keys)
    found, expected = method.score(from_cache), method.score(given)
    assert found.tokens.shape == (KV_HEADS, TOKENS - 8)
    assert found.tokens.isfinite().all()
    assert torch.equal(found.tokens, expected.tokens)
    for name, value in expected.stats.items():
        assert torch.equal(torch.as_tensor(found.stats[name]), torch.as_tensor(value))
    assert len(read) == (Need.KEYS in method.needs)


@pytest.mark.parametrize(
    "method",
    [*WAYS.values(), Tova(), Tova(window=2)],
    ids=lambda m: f"{m.name}-{m.window}",
)
def test_statistics_of_a_kernel_do_where_a_method_says_so(method: Method) -> None:
    """From a paged cache, as on a GPU: pages of 16 tokens in another order."""
    layer = layer_of(method)
    direct = method.score(layer)
    if not method.uses_window_statistics:
        ignored = replace(layer, observe=lambda: pytest.fail("it does not observe"))
        assert torch.equal(method.score(ignored).tokens, direct.tokens)
        return
    assert layer.queries is not None
    assert layer.keys is not None
    pages = torch.tensor([[5, 1, 4, 2, 0, 3]])
    cache = torch.zeros(6, KV_HEADS, 16, DIM)
    padded = torch.nn.functional.pad(layer.keys, (0, 0, 0, 6)).view(KV_HEADS, 6, 16, DIM)
    cache[pages[0]] = padded.transpose(0, 1)
    found = paged_window_statistics(
        layer.queries[None],
        cache,
        pages,
        num_tokens=[TOKENS],
        window=method.window,
        scale=layer.scale,
    ).job(0)
    scores = method.score(replace(layer, keys=None, observe=lambda: found))
    torch.testing.assert_close(scores.tokens, direct.tokens, rtol=1e-5, atol=1e-7)
    (numbers,) = to_numbers([scores])  # scalars are still on the device
    torch.testing.assert_close(dict(numbers.stats), dict(direct.stats), rtol=1e-5, atol=1e-7)


@every_way
def test_what_is_missing_is_named(method: Method) -> None:
    empty = replace(layer_of(method), queries=None, keys=None)
    if not method.needs:
        assert method.score(empty).tokens.shape == (KV_HEADS, TOKENS - 8)
        return
    expected = "all keys" if method.needs == {Need.KEYS} else "the window's queries and all keys"
    with pytest.raises(ValueError, match=f"^scoring needs {expected}$"):
        method.score(empty)


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_scored_in_fp32(name: str, dtype: torch.dtype) -> None:
    method = WAYS[name]
    half = layer_of(method, dtype=dtype)
    assert half.keys is not None
    queries = None if half.queries is None else half.queries.float()
    wide = replace(half, queries=queries, keys=half.keys.float())
    found = method.score(half).tokens
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, method.score(wide).tokens, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_snapkv_pools_the_windows_votes(pooling: Any, reduce: Any) -> None:
    method = SnapKV(window=8, kernel=3, pooling=pooling, reduce=reduce)
    layer = layer_of(method)
    votes = attention(layer)[..., : TOKENS - 8].mean(dim=1)
    around = torch.nn.functional.pad(votes, (1, 1)).unfold(1, 3, 1)
    pooled = by_group(around.mean(dim=2) if pooling == "avg" else around.amax(dim=2))
    expected = pooled.mean(dim=1) if reduce == "mean" else pooled.amax(dim=1)
    torch.testing.assert_close(method.score(layer).tokens, expected.float(), rtol=1e-5, atol=1e-7)


def test_snapkv_by_default_is_uniform() -> None:
    layer = layer_of(SnapKV())
    assert torch.equal(SnapKV().score(layer).tokens, Uniform().score(layer).tokens)


def test_h2o_ranks_by_column_sums_without_pooling() -> None:
    method = H2O(window=8)
    layer = layer_of(method)
    sums = by_group(attention(layer)[..., : TOKENS - 8].sum(dim=1)).mean(dim=1)
    found = method.score(layer).tokens
    torch.testing.assert_close(found * 8, sums.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(method.select(LayerScores(found), 20), sums.topk(20).indices.sort().values)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_tova_asks_the_last_query_alone_for_all_heads(window: int) -> None:
    method = Tova(window=window)
    layer = layer_of(method)
    last = attention(layer)[:, -1, : TOKENS - window].mean(dim=0)
    found = method.score(layer).tokens
    torch.testing.assert_close(found, last.float().repeat(KV_HEADS, 1), rtol=1e-5, atol=1e-7)
    assert torch.equal(found[0], found[1])
    if window > 1:  # earlier queries of the window have no say
        assert layer.queries is not None
        other = layer.queries.clone()
        other[:, :-1] = 7.0
        assert torch.equal(method.score(replace(layer, queries=other)).tokens, found)


def test_tova_passes_soft_cap_and_sinks_on() -> None:
    method = Tova(window=4)
    layer = layer_of(method, soft_cap=2.0, sinks=torch.linspace(-1, 1, HEADS))
    assert layer.queries is not None
    assert layer.keys is not None
    expected = window_statistics(
        layer.queries[:, -1:],
        layer.keys,
        window=4,
        scale=layer.scale,
        soft_cap=2.0,
        sinks=layer.sinks,
    ).mean.mean(dim=0)
    assert torch.equal(method.score(layer).tokens[0], expected)


# ---------------------------------------------------------------- keys; scores: test_kvpress.py


@pytest.mark.parametrize("method", [KeyDiff(window=8), Knorm(window=8)], ids=lambda m: m.name)
def test_keys_of_no_length_have_a_score(method: Method) -> None:
    layer = layer_of(method)
    assert layer.keys is not None
    for keys in (torch.zeros_like(layer.keys), layer.keys * (torch.arange(TOKENS) % 2)[:, None]):
        found = method.score(replace(layer, keys=keys)).tokens
        assert found.isfinite().all()
        assert (found[:, 0] == 0).all()


# -------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("method", "count", "expected"),
    [
        (StreamingLLM(window=8), 10, [0, 1, 2, 3, 76, 77, 78, 79, 80, 81]),
        (StreamingLLM(window=8), 3, [0, 1, 2]),
        (StreamingLLM(window=8, sinks=0), 3, [79, 80, 81]),
        (StreamingLLM(window=8, sinks=500), 3, [0, 1, 2]),
        (StreamingLLM(window=8, variant="first"), 5, [0, 1, 2, 3, 4]),
    ],
)
def test_streamingllm_keeps_positions(method: Method, count: int, expected: list[int]) -> None:
    scores = method.score(layer_of(method))
    assert method.select(scores, count).tolist() == [expected] * KV_HEADS
    assert method.needs == frozenset()


def test_positions_of_long_prompts_are_told_apart() -> None:
    method = StreamingLLM(window=8)
    tokens = method.score(replace(layer_of(method), num_tokens=2**21 + 8, keys=None)).tokens
    assert (tokens[0, 4:].diff() == 1).all()
    assert (tokens[0, :4].diff() == -1).all()
    assert tokens[0, 3] > tokens[0, -1]


# ---------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "name", ["snapkv", "streamingllm", "h2o", "tova", "keydiff", "knorm", "uniform", "random"]
)
def test_equal_budgets_are_known_beforehand(name: str) -> None:
    method = WAYS[name]
    assert method.allocator.budgets_ignore_scores
    assert method.scorer.budgets_are_nested
    layers = score_random(method, 4, tokens=TOKENS)
    assert token_budgets(method, layers, base=24, num_layers=4).tolist() == [24] * 4
    pages = page_budgets(method, layers, pages_per_layer=3, block_size=16, lengths=TOKENS)
    assert pages.tolist() == [3] * 4


def blank(layers: int, history: int) -> list[LayerScores]:
    return [LayerScores(torch.zeros(1, history)) for _ in range(layers)]


@pytest.mark.parametrize(
    ("prompt", "window", "base", "beta", "expected"),
    [
        (4000, 8, 120, 20, [234, 177, 120, 63, 6]),
        (1000, 8, 100, 4, [175, 100, 25]),
        (1000, 8, 120, 1, [120] * 5),
        (200, 16, 96, 20, range(184, 0, -22)),  # the first layer keeps all of its history
        (200, 8, 101, 20, [101] * 5),  # a short prompt: equal budgets
        (500, 8, 40, 20, [40]),
    ],
)
def test_pyramidkv_budgets_are_the_releases_where_its_step_is_whole(
    prompt: int, window: int, base: int, beta: int, expected: Sequence[int]
) -> None:
    """As KVCache-Factory computes them in integers; other steps: test_kvpress.py."""
    method, layers = PyramidKV(window=window, beta=beta), len(expected)
    found = token_budgets(method, blank(layers, prompt - window), base=base, num_layers=layers)
    assert found.tolist() == list(expected)


@settings(max_examples=60)
@given(
    layers=st.integers(1, 12),
    pages=st.integers(1, 12),
    block=st.sampled_from([1, 8, 16]),
    window=st.integers(1, 40),
    extra=st.integers(1, 900),
    beta=st.integers(1, 40),
)
def test_pyramidkv_spends_an_arena(
    layers: int, pages: int, block: int, window: int, extra: int, beta: int
) -> None:
    pages = max(pages, -(-window // block))
    prompt = pages * block + extra
    method = PyramidKV(window=window, beta=beta)
    found = page_budgets(
        method,
        blank(layers, prompt - window),
        pages_per_layer=pages,
        block_size=block,
        lengths=prompt,
    )
    assert found.sum() == pages * layers
    assert (np.diff(found) <= 0).all()
    assert (found * block <= prompt).all()

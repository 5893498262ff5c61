"""Methods and their registry: parameters, scores, weights, and independence of requests."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_kernels.selection import top_tokens
from tests.support.budgets import page_budgets, token_budgets
from tests.support.layers import random_layer, score_random
from vllm_kvcompress.methods import (
    Cake,
    DynamicKV,
    LayerScores,
    Random,
    Scatter,
    Uniform,
    available,
    get_method,
    to_numbers,
)
from vllm_kvcompress.methods.cake import CakeAllocator, FaithfulCake

SCORING = [
    "cake",
    "dynamickv",
    "h2o",
    "keydiff",
    "knorm",
    "pyramidkv",
    "random",
    "snapkv",
    "streamingllm",
    "tova",
    "uniform",
]


# -------------------------------------------------------------------------------------- registry


def test_all_methods_are_known():
    assert set(available()) >= {*SCORING, "none", "scatter"}
    for name in available():
        method = get_method(name, {})
        assert method.name == name
        # One query is what TOVA judges by; the others share a window, so that they can be compared.
        assert method.window == (1 if name == "tova" else 32)
        assert method.scorer.keeps_all == (name not in SCORING)


def test_parameters_arrive():
    method = get_method("cake", {"window": 16, "tau1": 2, "gamma": 0.5, "faithful": True})
    whole = FaithfulCake(window=16, tau1=2, gamma=0.5)
    assert (method.scorer, method.allocator) == (whole, whole)
    assert get_method("cake", {"tau2": 3, "kernel": 3}) == Cake(tau2=3, kernel=3)


def test_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r'unknown method "lru", known are cake, dynamickv, '):
        get_method("lru", {})


def test_unknown_parameter_names_the_accepted_ones():
    message = 'random: unknown parameter "gamma", accepted are allocator, scorer, seed, window'
    with pytest.raises(ValueError, match=message):
        get_method("random", {"gamma": 1.0})
    with pytest.raises(ValueError, match=r'scatter: unknown parameter "x", accepted are window$'):
        get_method("scatter", {"x": 1})


BAD = [
    ("cake", "window", 1, "an integer of at least 2"),
    ("cake", "window", 8.0, "an integer of at least 2"),
    ("cake", "tau1", 0, "a number above 0"),
    ("cake", "tau2", -1.0, "a number above 0"),
    ("cake", "tau1", math.nan, "a number above 0"),
    ("cake", "tau1", math.inf, "1e-06 to 2147483647 in size"),
    ("cake", "tau2", 1e-300, "1e-06 to 2147483647 in size"),
    ("cake", "gamma", 1e300, "0 or 1e-06 to 2147483647 in size"),
    ("cake", "kernel", 2**31 - 1, "at most 4095"),
    ("dynamickv", "r_max", 1.7e308, "0 or 1e-06 to 2147483647 in size"),
    ("random", "seed", 2**63, "at most 2147483647"),
    ("cake", "tau1", "1", "a number above 0"),
    ("cake", "tau1", True, "a number above 0"),
    ("cake", "gamma", -0.1, "a number of at least 0"),
    ("cake", "gamma", math.nan, "a number of at least 0"),
    ("cake", "kernel", 4, "an odd integer of at least 1"),
    ("cake", "every", -1, "an integer of at least 0"),
    ("cake", "faithful", 1, "true or false"),
    ("dynamickv", "window", 0, "an integer of at least 1"),
    ("dynamickv", "kernel", True, "an odd integer of at least 1"),
    ("dynamickv", "pooling", "avgpool", "one of avg, max"),
    ("dynamickv", "reduce", None, "one of mean, max"),
    ("dynamickv", "r_max", 0.5, "a number of at least 1"),
    ("dynamickv", "every", 0, "an integer of at least 1"),
    ("dynamickv", "min_tokens", -1, "an integer of at least 0"),
    ("dynamickv", "compare", "share", "one of background, mass"),
    ("dynamickv", "background", 0.0, "a number above 0 and below 1"),
    ("dynamickv", "background", 1, "a number above 0 and below 1"),
    ("dynamickv", "background", math.nan, "a number above 0 and below 1"),
    ("dynamickv", "faithful", "yes", "true or false"),
    ("snapkv", "kernel", 2, "an odd integer of at least 1"),
    ("snapkv", "pooling", "sum", "one of avg, max"),
    ("snapkv", "reduce", "sum", "one of mean, max"),
    ("pyramidkv", "beta", 0, "an integer of at least 1"),
    ("pyramidkv", "kernel", 2, "an odd integer of at least 1"),
    ("streamingllm", "sinks", -1, "an integer of at least 0"),
    ("streamingllm", "variant", "last", "one of recent, first"),
    ("tova", "window", 0, "an integer of at least 1"),
    ("uniform", "window", "32", "an integer of at least 1"),
    ("uniform", "kernel", 0, "an odd integer of at least 1"),
    ("random", "seed", -1, "an integer of at least 0"),
    ("random", "seed", True, "an integer of at least 0"),
    ("scatter", "window", 0, "an integer of at least 1"),
]


@pytest.mark.parametrize(("name", "param", "value", "expected"), BAD)
def test_bad_values_are_refused_in_one_sentence(name, param, value, expected):
    with pytest.raises(ValueError, match=f"{name}: {param} must be {expected}, got") as caught:
        get_method(name, {param: value})
    assert str(caught.value) == f"{name}: {param} must be {expected}, got {value!r}"


# ---------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", SCORING)
def test_a_request_does_not_see_its_neighbours(name):
    """Scored alone, or after another request: the same budgets and the same tokens, bit by bit."""
    method = get_method(name, {"window": 8})
    alone = score_random(method)
    other = score_random(method, seed=1)
    after = score_random(method)
    for first, again in zip(alone, after, strict=True):
        assert torch.equal(first.tokens, again.tokens)
        assert first.stats == again.stats
    budgets = token_budgets(method, alone, base=24, num_layers=6)
    assert token_budgets(method, other, base=24, num_layers=6).sum() == budgets.sum()
    assert token_budgets(method, after, base=24, num_layers=6).tolist() == budgets.tolist()


def test_cake_prefers_restless_and_spread_out_layers():
    method = Cake(window=2, tau1=1.0)
    calm = LayerScores(torch.zeros(1, 50), {"log_entropy": 0.0, "log_shift": 0.0})
    spread = LayerScores(torch.zeros(1, 50), {"log_entropy": math.log(3.0), "log_shift": 0.0})
    still = LayerScores(torch.zeros(1, 50), {"log_entropy": 5.0, "log_shift": -math.inf})
    weights = method.weights([calm, spread, still], base=9, num_layers=3)
    assert weights[1] / weights[0] == pytest.approx(3.0, rel=1e-12)
    assert weights[2] == 0.0
    warm = Cake(window=2, tau1=2.0).weights([calm, spread], base=9, num_layers=3)
    assert warm[1] / warm[0] == pytest.approx(math.sqrt(3.0), rel=1e-12)
    assert Cake(window=2).weights([still] * 3, base=9, num_layers=3).tolist() == [0.0] * 3


def test_cakes_temperatures_are_the_authors_where_none_are_given():
    calm = LayerScores(torch.zeros(1, 50), {"log_entropy": 0.0, "log_shift": 0.0})
    restless = LayerScores(torch.zeros(1, 50), {"log_entropy": 3.0, "log_shift": 1.2})
    weights = Cake().weights([calm, restless], base=9, num_layers=2)
    assert weights[1] / weights[0] == pytest.approx(math.exp(3.0 / 1.5 + 1.2 / 0.6), rel=1e-12)
    assert CakeAllocator(window=8, tau2=1.0).temperatures == (1.5, 1.0)
    assert FaithfulCake(window=8).temperatures == (1.0, 1.0)
    assert FaithfulCake(window=8, tau1=0.4, tau2=0.6).temperatures == (0.4, 0.6)


def test_cake_weights_survive_what_overflows_outside_the_log_domain():
    def layer(log_shift: float) -> LayerScores:
        return LayerScores(torch.zeros(1, 50), {"log_entropy": 9.0, "log_shift": log_shift})

    weights = Cake(tau2=0.01).weights([layer(-20), layer(-19), layer(-20)], base=9, num_layers=3)
    assert np.isfinite(weights).all()
    assert weights[0] == weights[2] > 0.0
    assert weights[1] / weights[0] == pytest.approx(math.exp(100), rel=1e-9)


def test_cake_gamma_rewards_variance():
    flat, sharp, same = (
        method.score(random_layer(method)).tokens
        for method in (Cake(window=8, gamma=0.0), Cake(window=8, gamma=50.0), Uniform(window=8))
    )
    assert bool((sharp >= flat).all())
    assert float((sharp - flat).max()) > 0.0
    torch.testing.assert_close(flat, same, atol=0, rtol=0)


def test_dynamickv_reductions():
    by_mean, by_max, mean = (
        method.score(random_layer(method)).tokens
        for method in (
            DynamicKV(window=8),
            DynamicKV(window=8, reduce="max"),
            Uniform(window=8, kernel=7),
        )
    )
    assert bool((by_max >= by_mean).all())
    assert not torch.equal(by_max, by_mean)
    # The window's sum is its mean times the number of queries.
    torch.testing.assert_close(by_mean, mean * 8, atol=1e-7, rtol=1e-5)


def test_dynamickv_counts_as_many_entries_as_the_layers_seen_may_keep():
    method = DynamicKV(window=8, compare="mass")
    seen = score_random(method)[:4]
    weights = method.weights(seen, base=24, num_layers=6)
    entries = torch.stack([layer.tokens for layer in seen]).flatten()
    threshold = entries.topk(24 * 2 * 4).values[-1]
    assert weights.tolist() == [float((layer.tokens >= threshold).sum()) for layer in seen]
    assert weights.sum() == 24 * 2 * 4


def test_dynamickv_counts_entries_by_how_far_they_stand_out():
    seen = score_random(DynamicKV(window=8))[:4]
    for share in (0.1, 0.5):
        method = DynamicKV(window=8, background=share)
        weights = method.weights(seen, base=24, num_layers=6)
        scores = torch.stack([s.tokens for s in seen])
        ranked = scores.sort(dim=-1).values
        entries = scores / ranked[..., math.ceil(share * ranked.shape[-1]) - 1, None]
        threshold = entries.flatten().topk(24 * 2 * 4).values[-1]
        assert weights.tolist() == [float((layer >= threshold).sum()) for layer in entries]
    weights = DynamicKV().weights(seen, base=24, num_layers=6)
    # What a layer's scores are measured in does not matter, as it does for the published count.
    louder = [replace(s, tokens=s.tokens * 2.0**i) for i, s in enumerate(seen)]
    assert DynamicKV().weights(louder, base=24, num_layers=6).tolist() == weights.tolist()
    by_mass = DynamicKV(compare="mass")
    assert (
        by_mass.weights(louder, base=24, num_layers=6).tolist()
        != by_mass.weights(seen, base=24, num_layers=6).tolist()
    )


def test_dynamickv_gives_a_sharp_layer_what_a_flat_one_takes_by_mass():
    # The same mass: spread over all tokens, or on 30 of them beside a sink that has most of it.
    flat = torch.linspace(0.9, 1.1, 400)[None] / 400
    sharp = torch.full((1, 400), 0.05 / 369)
    sharp[0, 0], sharp[0, 1:31] = 0.9, 0.05 / 30
    layers = [LayerScores(flat), LayerScores(sharp)]
    by_mass = DynamicKV(compare="mass").weights(layers, base=30, num_layers=2)
    assert by_mass.tolist() == [59, 1]
    assert DynamicKV().weights(layers, base=30, num_layers=2).tolist() == [29, 31]


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_dynamickv_compares_rows_without_a_middle(value):
    flat = LayerScores(torch.full((2, 50), value))
    spike = LayerScores(torch.nn.functional.one_hot(torch.tensor([3, 9]), 50).float())
    assert DynamicKV().weights([flat, spike], base=1, num_layers=2).tolist()[1] == 2
    assert DynamicKV().weights([flat, flat], base=10, num_layers=2).sum() == 40


def test_dynamickv_caps_a_dominant_layer():
    layers = [LayerScores(torch.full((1, 900), float(i == 2))) for i in range(8)]
    method = DynamicKV(window=8, r_max=3.0, compare="mass")
    budgets = token_budgets(method, layers, base=50, num_layers=8)
    assert budgets[2] == 150
    assert budgets.sum() == 400


def test_random_is_seeded_by_parameter_and_layer():
    def tokens(parameter: int, layer: int, **drawn: Any) -> torch.Tensor:
        method = Random(window=8, seed=parameter)
        return method.score(random_layer(method, layer, **drawn)).tokens

    first = tokens(1, 0)
    assert torch.equal(first, tokens(1, 0, seed=5, keys=None))
    assert not torch.equal(first, tokens(1, 1))
    assert not torch.equal(first, tokens(2, 0))


def test_scatter_keeps_all_and_has_no_scores():
    method = Scatter()
    with pytest.raises(RuntimeError, match="no scores"):
        method.score(random_layer(method))
    with pytest.raises(RuntimeError, match="no weights"):
        method.weights([], base=1, num_layers=1)


def test_scalars_left_on_a_device_become_numbers_in_one_go():
    tokens, heads = torch.zeros(1, 5), torch.rand(3, 5)
    waiting = [
        LayerScores(
            tokens, {"log_entropy": torch.tensor(0.1 * i), "log_shift": -math.inf, "heads": heads}
        )
        for i in range(3)
    ]
    found = to_numbers(waiting)
    assert [type(s.stats["log_entropy"]) for s in found] == [float] * 3
    assert [s.stat("log_entropy") for s in found] == pytest.approx([0.0, 0.1, 0.2])
    assert all(s.stat("log_shift") == -math.inf and s.stats["heads"] is heads for s in found)
    assert to_numbers(found) == found


# ----------------------------------------------------------------------- from scores to tokens


def test_selecting_for_all_layers_is_selecting_for_each():
    scores = [torch.rand(2, 40) for _ in range(3)]
    chosen = Cake().scorer.select_layers(scores, [7, 0, 40])
    for ids, score, count in zip(chosen, scores, [7, 0, 40], strict=True):
        assert torch.equal(ids, top_tokens(score, count))


@settings(max_examples=60)
@given(
    way=st.sampled_from(
        [(name, False) for name in SCORING] + [("cake", True), ("dynamickv", True)]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 20),
    window=st.integers(2, 8),
    pages=st.integers(1, 8),
    block=st.sampled_from([8, 16]),
    extra=st.integers(1, 60),
)
def test_protected_tokens_are_kept_exactly_once(way, dtype, seed, window, pages, block, extra):
    tokens = pages * block + extra
    name, faithful = way
    method = get_method(name, {"window": window} | ({"faithful": True} if faithful else {}))
    scores = score_random(method, seed=seed, tokens=tokens, dtype=dtype)
    found = page_budgets(method, scores, pages_per_layer=pages, block_size=block, lengths=tokens)
    assert found.sum() == pages * 6
    assert scores[0].tokens.dtype == torch.float32
    own_window = torch.arange(tokens - window, tokens).expand(2, -1)
    for layer, held in zip(scores, found.tolist(), strict=True):
        chosen = method.select(layer, held * block - window)
        ids = torch.cat((chosen, own_window), dim=-1)
        assert ids.shape == (2, held * block)
        assert all(len(set(head)) == held * block for head in ids.tolist())
        assert bool((ids.diff(dim=-1) > 0).all())


def test_faithful_differs_from_corrected_in_half_precision():
    plain = score_random(Cake(window=8), tokens=400, dtype=torch.bfloat16)
    faithful = score_random(Cake(window=8, faithful=True), tokens=400, dtype=torch.bfloat16)
    distinct = [len(scores[0].tokens.unique()) for scores in (plain, faithful)]
    assert distinct[1] < distinct[0] == 2 * 392
    torch.testing.assert_close(faithful[0].tokens, plain[0].tokens, rtol=0.1, atol=1e-3)

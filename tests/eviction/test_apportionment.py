"""Division of a pool of integers: exact, capped, monotone, ties in order."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.eviction.apportionment import apportion


def seats_one_at_a_time(weights, caps, pool, floors) -> list[int]:
    """Webster's rule in exact arithmetic."""
    floors = [min(f, c) for f, c in zip(floors, caps, strict=True)]
    pool = min(pool, sum(caps))
    if sum(floors) > pool:
        caps, floors = floors, [0] * len(caps)
    result = list(floors)
    while sum(result) < pool:
        open_layers = [i for i in range(len(caps)) if result[i] < caps[i]]
        if any(weights[i] > 0 for i in open_layers):
            open_layers = [i for i in open_layers if weights[i] > 0]
            value = {i: Fraction(weights[i]) / Fraction(2 * result[i] + 1) for i in open_layers}
        else:
            value = {i: Fraction(1, 2 * result[i] + 1) for i in open_layers}
        best = min(open_layers, key=lambda i: (-value[i], i))
        result[best] += 1
    return result


few = st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.1, 7.5, 1e-300, 1e300, 5e-324, 123.456])
any_weight = st.one_of(few, st.floats(0, 1e300, allow_nan=False))


@settings(max_examples=200)
@given(
    layers=st.lists(
        st.tuples(any_weight, st.integers(0, 40), st.sampled_from([0, 0, 1, 3, 50])),
        min_size=1,
        max_size=7,
    ),
    pool=st.integers(0, 150),
)
def test_apportion_is_websters_rule(layers, pool):
    weights, caps, floors = (list(column) for column in zip(*layers, strict=True))
    found = apportion(weights, caps, pool, floors=floors)
    assert found.dtype == np.int64
    assert found.sum() == min(pool, sum(caps))
    assert ((found >= 0) & (found <= caps)).all()
    expected = seats_one_at_a_time(weights, caps, pool, floors)
    differ = np.flatnonzero(found != np.array(expected))
    # Seats whose exact quotients differ by less than fp64 can tell may be swapped, no others.
    disputed = [Fraction(weights[i]) / (2 * max(found[i], expected[i]) - 1) for i in differ]
    assert not disputed or max(disputed) - min(disputed) <= max(disputed) / 2**50


@pytest.mark.parametrize("seed", range(40))
def test_apportion_is_websters_rule_for_ordinary_weights(seed):
    rng = np.random.default_rng(seed)
    weights = rng.random(9) ** 3
    caps = rng.integers(1, 12, size=9)
    pool = int(rng.integers(5, 60))
    expected = seats_one_at_a_time(weights.tolist(), caps.tolist(), pool, [0] * 9)
    assert apportion(weights, caps, pool).tolist() == expected


@settings(max_examples=150)
@given(
    weights=st.lists(any_weight, min_size=2, max_size=12),
    cap=st.integers(0, 3000),
    floor=st.integers(0, 30),
    pool=st.integers(0, 5000),
)
def test_another_layer_never_raises_a_share(weights, cap, floor, pool):
    count = len(weights)
    shares = [
        apportion(weights[:n], [cap] * n, pool, floors=[floor] * n) for n in range(1, count + 1)
    ]
    for fewer, more in pairwise(shares):
        assert (more[:-1] <= fewer).all()


@pytest.mark.parametrize("shift", [-1000, -3, 0, 500])
def test_only_ratios_count(shift):
    weights = np.array([1.0, 3.0, 7.0, 0.3])
    expected = apportion(weights, [900] * 4, 1000)
    assert apportion(np.ldexp(weights, shift), [900] * 4, 1000).tolist() == expected.tolist()
    # The last seat is a three-way tie: 1 / 88.5 == 3 / 265.5 == 7 / 619.5.
    assert expected.tolist() == [89, 265, 619, 27]


def test_large_pool_is_proportional():
    rng = np.random.default_rng(0)
    weights = rng.random(80) + 0.01
    found = apportion(weights, [10**6] * 80, 10**6)
    assert found.sum() == 10**6
    assert np.abs(found - weights / weights.sum() * 10**6).max() <= 1.0


def test_large_pool_with_caps_is_water_filling():
    weights = np.array([100.0, 1.0, 2.0, 1.0])
    assert apportion(weights, [50, 10**6, 10**6, 10**6], 1050).tolist() == [50, 250, 500, 250]


def test_ties_go_to_the_lower_index():
    assert apportion([0.0, 0.0, 0.0], [10, 10, 10], 7).tolist() == [3, 2, 2]
    assert apportion([0.0, 5.0, 0.0], [10, 10, 10], 15).tolist() == [3, 10, 2]
    assert apportion([1.0] * 4, [9] * 4, 6).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("weights", "caps", "pool", "floors"),
    [
        ([1.0, -1.0], [5, 5], 3, None),
        ([1.0, math.nan], [5, 5], 3, None),
        ([1.0, math.inf], [5, 5], 3, None),
        ([1.0], [5, 5], 3, None),
        ([1.0, 1.0], [5, -5], 3, None),
        ([1.0, 1.0], [5, 5], -3, None),
        ([1.0, 1.0], [5, 5], 3, [-1, 0]),
        ([1.0, 1.0], [5, 5], 3, [0]),
    ],
)
def test_apportion_refuses(weights, caps, pool, floors):
    with pytest.raises(ValueError, match=r"must"):
        apportion(weights, caps, pool, floors=floors)

"""Budgets of a request: a cascade of cuts ends where one cut at the end would."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eviction.test_apportionment import any_weight
from tests.support.budgets import page_budgets, token_budgets
from vllm_kvcompress.eviction.layer_budgets import BudgetDivision
from vllm_kvcompress.methods import (
    Allocator,
    Cake,
    DynamicKV,
    LayerScores,
    MethodSpec,
)
from vllm_kvcompress.methods.cake import CakeAllocator, CakeScorer
from vllm_kvcompress.methods.random import RandomScorer


@dataclass(frozen=True, kw_only=True)
class GivenAllocator(Allocator):
    """Weights as told, one per layer whatever else is seen; own cap, floor and divisions."""

    told: Sequence[float] = ()
    most: int | None = None
    least: int = 0
    every: int = 0

    @property
    def layers_per_division(self) -> int:
        return self.every

    def weights(self, seen, *, base, num_layers):
        return np.array(self.told[: len(seen)], dtype=np.float64)

    def cap(self, history: int, base: int) -> int:
        return history if self.most is None else min(history, self.most)

    def floor(self, history: int, base: int) -> int:
        return self.least


class RestlessCakeAllocator(CakeAllocator):
    """CAKE's, every division of which is made."""

    ratios_are_fixed = False


Given = MethodSpec(name="given", scorer=RandomScorer, allocator=GivenAllocator)
CakeAt = MethodSpec(name="cake-at", scorer=CakeScorer, allocator=RestlessCakeAllocator)


def blank(count: int, history: int) -> list[LayerScores]:
    return [LayerScores(torch.zeros(1, history)) for _ in range(count)]


divisions = st.integers(0, 6)
log_p = st.one_of(
    st.floats(-300, 300), st.just(-math.inf), st.sampled_from([0.0, 1.0, math.log(3)])
)


def cake_layers(logs, history: int) -> list[LayerScores]:
    return [
        LayerScores(torch.zeros(1, history), {"log_entropy": h, "log_shift": v}) for h, v in logs
    ]


@settings(max_examples=150)
@given(
    logs=st.lists(st.tuples(log_p, log_p), min_size=1, max_size=10),
    history=st.integers(1, 600),
    base=st.integers(0, 400),
    every=divisions,
)
def test_cascade_equals_one_shot_for_cake_in_tokens(logs, history, base, every):
    layers = cake_layers(logs, history)
    count = len(layers)
    at_end, staged, direct = (
        token_budgets(method, layers, base=base, num_layers=count)
        for method in (CakeAt(window=2, every=0), CakeAt(window=2, every=every), Cake(window=2))
    )
    assert Cake(window=2).allocator.ratios_are_fixed
    assert staged.tolist() == at_end.tolist() == direct.tolist()
    assert staged.sum() == min(base, history) * count
    assert (staged <= history).all()


@settings(max_examples=250)
@given(
    logs=st.lists(st.tuples(log_p, log_p), min_size=1, max_size=10),
    data=st.data(),
    equal=st.booleans(),
    pages=st.integers(1, 40),
    block=st.sampled_from([1, 4, 16, 32, 128]),
    window=st.integers(2, 32),
    rest=st.integers(0, 60),
    every=divisions,
)
def test_cascade_equals_one_shot_for_cake_in_pages(
    logs, data, equal, pages, block, window, rest, every
):
    """Of equal layers, or as an earlier cut left them: whole pages, and as many tokens more."""
    reserved = -(-window // block)
    count = len(logs)
    if equal:
        held = [data.draw(st.integers(max(pages, reserved), 300))] * count
    else:
        held = data.draw(st.lists(st.integers(reserved, 60), min_size=count, max_size=count))
    pages = min(max(pages, reserved), sum(held) // count)
    rest += sum(held) == pages * count  # there must be something to evict
    lengths = [h * block + rest for h in held]
    layers = [
        LayerScores(torch.zeros(1, length - window), {"log_entropy": h, "log_shift": v})
        for (h, v), length in zip(logs, lengths, strict=True)
    ]
    at_end, staged, direct, *same = (
        page_budgets(method, layers, pages_per_layer=pages, block_size=block, lengths=given)
        for method, given in (
            (CakeAt(window=window, every=0), lengths),
            (CakeAt(window=window, every=every), lengths),
            (Cake(window=window), lengths),
            *([(Cake(window=window), lengths[0])] if equal else []),
        )
    )
    assert staged.tolist() == at_end.tolist() == direct.tolist()
    assert all(budgets.tolist() == direct.tolist() for budgets in same)
    assert staged.sum() == pages * count
    assert (staged >= reserved).all()
    assert (staged * block <= np.array(lengths)).all()


def test_a_layer_that_holds_little_leaves_its_share_to_the_others():
    method = Given(told=[1.0, 1.0, 1.0], window=8)
    layers = [LayerScores(torch.zeros(1, tokens - 8)) for tokens in (34, 200, 200)]
    found = page_budgets(method, layers, pages_per_layer=5, block_size=16, lengths=[34, 200, 200])
    assert found.tolist() == [2, 7, 6]
    with pytest.raises(ValueError, match=r"200 tokens fits the budget of 160: nothing to evict"):
        page_budgets(method, layers, pages_per_layer=10, block_size=16, lengths=[34, 200, 200])


@settings(max_examples=100)
@given(
    told=st.lists(st.lists(any_weight, min_size=8, max_size=8), min_size=8, max_size=8),
    history=st.integers(1, 300),
    base=st.integers(0, 200),
    most=st.integers(0, 300),
    least=st.integers(0, 50),
    every=divisions,
)
def test_a_layer_never_grows_whatever_the_weights_do(told, history, base, most, least, every):
    """Weights that change at every cut: still exact at the end, never growing on the way."""

    class Fickle(GivenAllocator):
        def weights(self, seen, *, base, num_layers):
            return np.array(told[len(seen) - 1][: len(seen)])

    spec = MethodSpec(name="fickle", scorer=RandomScorer, allocator=Fickle)
    method = spec(most=most, least=least, every=every)
    pool, cap = base * 8, min(history, max(most, base))
    cascade = BudgetDivision(method, pool=pool, cap=cap, floor=least, base=base, num_layers=8)
    before = np.zeros(0, dtype=np.int64)
    for layer in blank(8, history):
        cascade.add(layer)
        now = cascade.held
        assert (now[: len(before)] <= before).all()
        assert (now <= cap).all()
        before = now
    assert before.sum() == min(pool, cap * 8)
    found = token_budgets(method, blank(8, history), base=base, num_layers=8)
    assert found.tolist() == before.tolist()


def test_minimum_tokens_are_honoured():
    layers = [LayerScores(torch.full((1, 500), float(layer == 3))) for layer in range(4)]
    starving, feeding = (DynamicKV(window=8, compare="mass", min_tokens=m) for m in (0, 20))
    starved = token_budgets(starving, layers, base=50, num_layers=4)
    fed = token_budgets(feeding, layers, base=50, num_layers=4)
    assert starved.tolist() == [0, 0, 0, 200]
    assert fed.tolist() == [20, 20, 20, 140]
    pages = page_budgets(
        feeding,
        layers,
        pages_per_layer=4,
        block_size=16,
        lengths=508,
    )
    assert pages.tolist() == [2, 2, 2, 10]


def test_a_cap_too_small_for_the_pool_is_raised_just_enough():
    method = Given(told=[1.0, 2.0, 3.0], most=10, window=8)
    layers = blank(3, 192)
    assert token_budgets(method, layers, base=40, num_layers=3).tolist() == [40, 40, 40]
    found = page_budgets(method, layers, pages_per_layer=3, block_size=16, lengths=200)
    assert found.tolist() == [3, 3, 3]


def test_short_prompts_keep_everything():
    method = Given(told=[1.0, 0.0, 5.0], window=8)
    assert token_budgets(method, blank(3, 30), base=40, num_layers=3).tolist() == [30, 30, 30]


def test_part_of_the_layers_shares_the_whole_pool():
    method = Given(told=[1.0, 3.0, 5.0, 7.0], window=8, every=3)
    found = token_budgets(method, blank(2, 1000), base=50, num_layers=4)
    assert found.tolist() == [50, 150]


def test_between_cuts_nothing_is_returned():
    method = Given(told=[1.0] * 5, every=2)
    cascade = BudgetDivision(method, pool=50, cap=30, floor=0, base=10, num_layers=5)
    steps = [cascade.add(layer) for layer in blank(5, 30)]
    assert [None if s is None else s.tolist() for s in steps] == [
        None,
        [25, 25],
        None,
        [13, 13, 12, 12],
        [10, 10, 10, 10, 10],
    ]
    with pytest.raises(ValueError, match="seen already"):
        cascade.add(blank(1, 30)[0])


def test_wrong_number_of_weights_is_refused():
    with pytest.raises(ValueError, match="given: weights must have shape"):
        token_budgets(Given(told=[1.0]), blank(2, 30), base=4, num_layers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": 64}, "nothing to evict"),
        ({"pages_per_layer": 1, "method": Given(told=[1.0] * 2, window=17)}, "needs 2 pages"),
    ],
)
def test_page_budgets_refuses(change, message):
    arguments = {
        "method": Given(told=[1.0] * 2, window=8),
        "layers": blank(2, 92),
        "pages_per_layer": 4,
        "block_size": 16,
        "lengths": 100,
    }
    with pytest.raises(ValueError, match=message):
        page_budgets(**(arguments | change))

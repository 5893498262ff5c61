"""Cuts of compositions: a cascade over layers ends where one cut after the last layer does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.eviction.test_layerwise import World, check_against_one_cut, geometry_of, score
from vllm_kvcompress.eviction.layer_budgets import page_budgets
from vllm_kvcompress.methods import Cake, LayerScores, Method, MethodSpec, Tova, get_method
from vllm_kvcompress.methods.uniform import UniformScorer
from vllm_kvcompress.planning.block_planner import layers_between_cuts

CUT: dict[str, Method] = {
    "keydiff+cake": get_method("cake", {"window": 5, "scorer": "keydiff"}),
    "keydiff+cake-4": get_method("cake", {"window": 5, "scorer": "keydiff", "every": 4}),
    "tova+cake": get_method("tova", {"window": 5, "allocator": "cake"}),
    "snapkv+dynamickv": get_method(
        "snapkv", {"window": 5, "allocator": {"method": "dynamickv", "every": 2, "r_max": 1.5}}
    ),
    "random+dynamickv-floor": get_method(
        "dynamickv", {"window": 8, "scorer": "random", "min_tokens": 9}
    ),
    "cake+pyramidkv": get_method("cake", {"window": 5, "allocator": "pyramidkv"}),
    "streamingllm+uniform": get_method("streamingllm", {"window": 5, "allocator": "uniform"}),
    "pyramidkv": get_method("pyramidkv", {"window": 5, "beta": 3}),
    "tova": Tova(),
}
every_method = pytest.mark.parametrize("method", CUT.values(), ids=CUT.keys())


@every_method
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 9),
    size=st.sampled_from([1, 4, 8]),
    blocks=st.integers(1, 6),
    extra=st.integers(1, 60),
    cached=st.integers(0, 12),
    ties=st.booleans(),
)
def test_a_cascade_ends_where_one_cut_does(
    method: Method,
    seed: int,
    count: int,
    size: int,
    blocks: int,
    extra: int,
    cached: int,
    ties: bool,
) -> None:
    blocks += -(-method.window // size)
    prompt = blocks * size + extra
    world = World(
        method,
        geometry_of(count, size, "layer"),
        prompt,
        blocks,
        cached=min(cached, (prompt - 1) // size),
        seed=seed,
    )
    check_against_one_cut(method, world, score(seed, count, prompt - method.window, ties=ties))


@every_method
def test_budgets_that_no_score_changes_are_known_beforehand(method: Method) -> None:
    found = [
        page_budgets(
            method,
            score(seed, 6, 112, ties=False),
            pages_per_layer=3,
            block_size=16,
            lengths=112 + method.window,
        ).tolist()
        for seed in range(4)
    ]
    assert method.budgets_ignore_scores == all(budgets == found[0] for budgets in found)


@every_method
def test_a_smaller_budget_keeps_the_best_of_a_larger_one(method: Method) -> None:
    assert method.budgets_are_nested
    (scores,) = score(5, 1, 112, ties=True)
    kept = [method.select(scores, count) for count in (5, 40)]
    for fewer, more in zip(*kept, strict=True):
        assert set(fewer.tolist()) <= set(more.tolist())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (CUT["keydiff+cake"], 1),
        (CUT["keydiff+cake-4"], 4),
        (CUT["snapkv+dynamickv"], 2),
        (CUT["cake+pyramidkv"], 1),
        (get_method("cake", {"scorer": "snapkv", "every": 0}), 10),
    ],
)
def test_layers_held_at_one_time_follow_the_allocator(method: Method, expected: int) -> None:
    assert layers_between_cuts(method, 10) == expected


class LatestScorer(UniformScorer):
    """Chooses tokens in a way of its own, so a smaller budget need not be part of a larger."""

    stores_by_worth = True

    def select(self, tokens: Tensor, count: int) -> Tensor:
        history = tokens.shape[-1]
        return torch.arange(history - count, history).expand(len(tokens), -1)


def test_how_tokens_are_chosen_is_the_scorers_business() -> None:
    cake = Cake(window=8)
    method = Method("latest+cake", LatestScorer(window=8), cake.allocator)
    assert not method.budgets_are_nested
    assert method.stores_by_worth
    layers = [LayerScores(torch.rand(2, 20))] * 2
    chosen = [found.tolist() for found in method.select_layers(layers, [3, 5])]
    assert chosen == [[list(range(20 - count, 20))] * 2 for count in (3, 5)]
    assert layers_between_cuts(method, 10) == 10
    latest = MethodSpec(name="latest", scorer=LatestScorer)(window=8)
    assert Method("cake+latest", cake.scorer, latest.allocator).budgets_are_nested

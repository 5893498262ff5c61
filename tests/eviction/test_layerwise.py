"""Cutting layers while a prompt runs: it must end where one cut after the last layer ends.

Beside each cascade runs a small memory of pages, to which every layer writes its tokens and every
placement copies them, so that a page reused too early shows as a wrong token.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.budgets import page_budgets
from vllm_kvcompress.eviction.layerwise import LayerwiseEviction
from vllm_kvcompress.eviction.selection import by_worth, with_window
from vllm_kvcompress.methods import (
    Cake,
    DynamicKV,
    LayerScores,
    Method,
    MethodSpec,
    Random,
    Tova,
    Uniform,
    get_method,
)
from vllm_kvcompress.methods.uniform import UniformScorer
from vllm_kvcompress.paging.arena import PageGeometry
from vllm_kvcompress.planning.block_planner import layers_between_cuts
from vllm_kvcompress.planning.compression_schedule import Cut

HEADS, BLOCKS = 2, 400
METHODS: dict[str, Method] = {
    "cake-1": Cake(window=5),
    "cake-4": Cake(window=5, every=4),
    "cake-3-aligned": Cake(window=8, every=3),
    "cake-at-the-end": Cake(window=5, every=0),
    "cake-faithful": Cake(window=5, faithful=True),
    "cake-faithful-4": Cake(window=5, faithful=True, every=4),
    "dynamickv": DynamicKV(window=5),
    "dynamickv-1": DynamicKV(window=8, every=1, r_max=1.5),
    "dynamickv-floor": DynamicKV(window=5, every=2, min_tokens=9),
    "dynamickv-faithful": DynamicKV(window=5, faithful=True),
    "uniform": Uniform(window=5),
    "random": Random(window=5),
}
COMPOSITIONS: dict[str, Method] = {
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
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
ALL = METHODS | COMPOSITIONS
every_composition_too = pytest.mark.parametrize("method", ALL.values(), ids=ALL.keys())


def score(seed: int, layers: int, history: int, *, ties: bool) -> list[LayerScores]:
    """Everything that any method's weights look at; ``ties``: hardly any two tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layers):
        entropy, shift, tilt = (6 * torch.rand(3, generator=generator) - 3).tolist()
        heads = torch.rand(2 * HEADS, history, generator=generator) ** (3 + tilt)
        if ties:
            heads = (3 * heads).round()
        found.append(
            LayerScores(
                tokens=heads.view(HEADS, 2, history).amax(dim=1),
                stats={
                    "log_entropy": entropy,
                    # Statistics may still be on their way from the device.
                    "log_shift": torch.tensor(shift),
                    "preference": float(np.exp(entropy + shift)),
                    "query_heads": heads,
                },
            )
        )
    return found


def geometry_of(layers: int, size: int, outermost: str) -> PageGeometry:
    if outermost == "layer":
        return PageGeometry(np.arange(layers) * BLOCKS, 1, BLOCKS, size)
    return PageGeometry(np.arange(layers), layers, BLOCKS, size)


class World:
    """A prompt in the pool: its blocks, its cascade, and what lies in every page."""

    def __init__(
        self,
        method: Method,
        geometry: PageGeometry,
        prompt: int,
        arena_blocks: int,
        cached: int = 0,
        seed: int = 0,
    ) -> None:
        self.geometry, self.size, self.layers = geometry, geometry.block_size, geometry.num_layers
        self.prompt = prompt
        whole = -(-prompt // self.size)
        self.cut = Cut(prompt, arena_blocks)
        at_once = layers_between_cuts(method, self.layers)
        free = np.random.default_rng(seed).permutation(np.arange(1, BLOCKS)).tolist()
        needed = -(-at_once * (whole - cached) // self.layers)
        self.cached = free[:cached]
        self.arena = free[cached : cached + arena_blocks]
        self.workspace = free[cached + arena_blocks : cached + arena_blocks + needed]
        self.cascade = LayerwiseEviction(
            method,
            geometry,
            self.cut,
            cached=self.cached,
            workspace=self.workspace,
            arena=self.arena,
            layers_per_division=at_once,
        )
        #: Per page, head and slot the token there, as layer * prompt + token; -1 for rubbish.
        self.memory = np.full((BLOCKS * self.layers, HEADS, self.size), -1, dtype=np.int64)
        for layer in range(self.layers):
            self.write(layer, range(cached * self.size), geometry.pages(layer, self.cached))

    def write(self, layer: int, tokens: range, pages: np.ndarray) -> None:
        """Put a layer's tokens into pages, from the first slot on, the same for all heads."""
        for slot, token in enumerate(tokens):
            page = pages[slot // self.size]
            self.memory[page, :, slot % self.size] = layer * self.prompt + token

    def read(self, pages: np.ndarray, tokens: Tensor) -> np.ndarray:
        """What lies in some slots of a row of pages, [N, T]."""
        slot = tokens.numpy()
        head = np.arange(HEADS)[:, None]
        return self.memory[pages[slot // self.size], head, slot % self.size]

    def run(self, layers: list[LayerScores]) -> None:
        """Let all layers attend and be cut, as the worker does."""
        arena = set(self.geometry.all_pages(self.arena).reshape(-1).tolist())
        spare = set(self.geometry.all_pages(self.workspace).reshape(-1).tolist())
        cascade, begin = self.cascade, len(self.cached) * self.size
        for layer, scores in enumerate(layers):
            assert not cascade.done
            source = cascade.sources[layer]
            assert source[: len(self.cached)].tolist() == (
                self.geometry.pages(layer, self.cached).tolist()
            )
            assert spare.issuperset(source[len(self.cached) :].tolist())
            self.write(layer, range(begin, self.prompt), source[len(self.cached) :])
            for placement in cascade.take(scores):
                assert arena.issuperset(placement.pages.tolist())
                assert placement.tokens.shape == (HEADS, len(placement.pages) * self.size)
                found = self.read(cascade.sources[placement.layer], placement.tokens)
                for index, page in enumerate(placement.pages):
                    self.memory[page] = found[:, index * self.size : (index + 1) * self.size]
            held = [page for table in cascade.tables for page in table.tolist()]
            assert len(held) == len(set(held))
            assert arena.issuperset(held)
        assert cascade.done
        assert set(held) == arena


def check_against_one_cut(method: Method, world: World, layers: list[LayerScores]) -> None:
    """The same pages per layer and the same tokens per head as one cut after the last layer."""
    world.run(layers)
    counts = page_budgets(
        method,
        layers,
        pages_per_layer=world.cut.blocks,
        block_size=world.size,
        lengths=world.prompt,
    )
    cascade = world.cascade
    assert [len(table) for table in cascade.tables] == counts.tolist()
    chosen = method.scorer.select_layers(
        [s.tokens for s in layers], (counts * world.size - method.window).tolist()
    )
    for layer, history in enumerate(chosen):
        if method.scorer.stores_by_worth:
            history = by_worth(history, layers[layer].tokens).flip(1)
        expected = with_window(history, world.prompt, method.window)
        kept, order = cascade.kept[layer], cascade.in_order(layer)
        assert torch.equal(kept.gather(1, order), expected)
        worth = layers[layer].tokens.gather(1, kept[:, : history.shape[1]])
        assert (worth.diff(dim=1) >= 0).all()
        # They are where the cascade says they are, and in order once it has been followed.
        lies = world.read(cascade.tables[layer], order)
        assert np.array_equal(lies, expected.numpy() + layer * world.prompt)


@every_composition_too
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 9),
    size=st.sampled_from([1, 4, 8]),
    blocks=st.integers(1, 6),
    extra=st.integers(1, 60),
    cached=st.integers(0, 12),
    outermost=st.sampled_from(["layer", "block"]),
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
    outermost: str,
    ties: bool,
) -> None:
    blocks += -(-method.window // size)
    prompt = blocks * size + extra
    world = World(
        method,
        geometry_of(count, size, outermost),
        prompt,
        blocks,
        cached=min(cached, (prompt - 1) // size),
        seed=seed,
    )
    check_against_one_cut(method, world, score(seed, count, prompt - method.window, ties=ties))


@every_method
def test_a_window_that_fills_the_arena_is_all_that_is_kept(method: Method) -> None:
    """Budgets of whole pages leave no room for history where blocks are as long as the window."""
    size = method.window
    world = World(method, geometry_of(5, size, "layer"), 7 * size + 3, 1)
    check_against_one_cut(method, world, score(1, 5, 6 * size + 3, ties=False))
    for kept in world.cascade.kept:
        assert kept.tolist() == [list(range(6 * size + 3, 7 * size + 3))] * HEADS


@every_method
def test_tokens_of_equal_worth_are_given_up_from_the_last_one_on(method: Method) -> None:
    world = World(method, geometry_of(6, 4, "block"), 90, 4)
    layers = score(2, 6, 90 - method.window, ties=False)
    heads = torch.ones(4, 90 - method.window)
    layers = [
        LayerScores(torch.ones_like(s.tokens), {**s.stats, "query_heads": heads}) for s in layers
    ]
    check_against_one_cut(method, world, layers)
    for layer, kept in enumerate(world.cascade.kept):
        history = len(world.cascade.tables[layer]) * 4 - method.window
        assert kept[0, :history].tolist() == list(range(history))[::-1]


def test_layers_give_pages_back_and_take_none() -> None:
    # The first layer has the whole pool until the others show what they deserve.
    method = Cake(window=4, every=2)
    world = World(method, geometry_of(4, 4, "layer"), 100, 5)
    layers = [
        LayerScores(torch.rand(HEADS, 96), {"log_entropy": 0.0, "log_shift": 0.0}) for _ in range(4)
    ]
    assert world.cascade.take(layers[0]) == []
    assert world.cascade.tables == []
    assert [p.layer for p in world.cascade.take(layers[1])] == [0, 1]
    first = [table.tolist() for table in world.cascade.tables]
    # 20 pages less one each for the windows of the two layers to come.
    assert [len(pages) for pages in first] == [9, 9]
    assert world.cascade.take(layers[2]) == []
    assert [p.layer for p in world.cascade.take(layers[3])] == [2, 3]
    assert [len(table) for table in world.cascade.tables] == [5] * 4
    for before, after in zip(first, world.cascade.tables, strict=False):
        assert after.tolist() == before[4:]


@pytest.mark.parametrize("method", [Uniform(window=4), Random(window=4)], ids=lambda m: m.name)
def test_equal_shares_are_final_from_the_first_layer_on(method: Method) -> None:
    world = World(method, geometry_of(4, 4, "layer"), 100, 5)
    assert len(world.workspace) == 7  # 25 pages of one layer lie in 7 blocks of 4
    for layer, scores in enumerate(score(3, 4, 96, ties=False)):
        (placement,) = world.cascade.take(scores)
        assert placement.layer == layer
        assert [len(table) for table in world.cascade.tables] == [5] * (layer + 1)


@pytest.mark.parametrize(("at_once", "cached", "needed"), [(1, 0, 5), (2, 0, 9), (1, 10, 3)])
def test_a_workspace_that_is_too_small_is_refused(at_once: int, cached: int, needed: int) -> None:
    def lay_out(workspace: int) -> LayerwiseEviction:
        return LayerwiseEviction(
            Cake(window=4),
            geometry_of(5, 4, "layer"),
            Cut(84, 3),
            cached=range(100, 100 + cached),
            workspace=range(1, 1 + workspace),
            arena=[50, 51, 52],
            layers_per_division=at_once,
        )

    expected = f"{needed - 1} blocks have too few pages for {at_once} x {21 - cached}"
    with pytest.raises(ValueError, match=expected):
        lay_out(needed - 1)
    sources = lay_out(needed).sources
    assert [len(pages) for pages in sources] == [21] * 5
    # Layers between two cuts share no page; those after a cut begin anew.
    assert len(np.unique(np.concatenate(sources[:at_once]))) == 21 * at_once
    own = slice(cached, None)
    assert sources[0][own].tolist() == sources[at_once][own].tolist()


def test_a_prompt_with_nothing_to_evict_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evict"):
        World(Cake(window=4), geometry_of(3, 4, "layer"), 20, 5)


# --- what methods say of themselves --------------------------------------------------------------


@every_composition_too
def test_only_budgets_that_no_score_changes_are_known_beforehand(method: Method) -> None:
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
    assert method.allocator.budgets_ignore_scores == all(budgets == found[0] for budgets in found)


@every_composition_too
def test_with_a_smaller_budget_a_layer_keeps_the_best_of_what_it_kept(method: Method) -> None:
    assert method.scorer.budgets_are_nested
    (scores,) = score(5, 1, 112, ties=True)
    kept = [method.select(scores, count) for count in (0, 5, 40, 112)]
    for fewer, more in itertools.pairwise(kept):
        for head in range(HEADS):
            assert set(fewer[head].tolist()) <= set(more[head].tolist())


class LatestScorer(UniformScorer):
    """Chooses tokens in a way of its own, so a smaller budget need not be part of a larger."""

    stores_by_worth = True

    def select(self, tokens: Tensor, count: int) -> Tensor:
        history = tokens.shape[-1]
        return torch.arange(history - count, history).expand(len(tokens), -1)


def test_how_tokens_are_chosen_is_the_scorers_business() -> None:
    cake = Cake(window=8)
    method = Method("latest+cake", LatestScorer(window=8), cake.allocator)
    assert not method.scorer.budgets_are_nested
    assert method.scorer.stores_by_worth
    layers = [torch.rand(2, 20)] * 2
    chosen = [found.tolist() for found in method.scorer.select_layers(layers, [3, 5])]
    assert chosen == [[list(range(20 - count, 20))] * 2 for count in (3, 5)]
    assert layers_between_cuts(method, 10) == 10
    latest = MethodSpec(name="latest", scorer=LatestScorer)(window=8)
    assert Method("cake+latest", cake.scorer, latest.allocator).scorer.budgets_are_nested

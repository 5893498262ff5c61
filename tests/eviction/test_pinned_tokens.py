"""Tokens that a request wants kept: their ranges, where they go, and that they are chosen."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eviction.test_layerwise import METHODS, geometry_of, score
from tests.support.budgets import page_budgets
from vllm_kvcompress.eviction.layerwise import LayerwiseEviction
from vllm_kvcompress.eviction.pinned_tokens import PinnedPlaces, PinnedTokens, rank_first
from vllm_kvcompress.eviction.selection import Selection, select_survivors
from vllm_kvcompress.methods import DynamicKV, LayerScores, Method
from vllm_kvcompress.planning.block_planner import layers_between_cuts
from vllm_kvcompress.planning.compression_schedule import Cut
from vllm_kvcompress.planning.pinned_ranges import count_before, ids_between, parse_ranges, shown

PROMPT = 60
pairs = st.tuples(st.integers(0, PROMPT - 1), st.integers(1, PROMPT)).map(
    lambda pair: [pair[0], min(pair[0] + pair[1], PROMPT)]
)


def tokens_of(ranges: Any) -> set[int]:
    return {token for start, end in ranges for token in range(start, end)}


# --- ranges --------------------------------------------------------------------------------------


@given(st.lists(pairs, max_size=6))
def test_ranges_are_put_in_order_and_merged(asked: list[list[int]]) -> None:
    ranges = parse_ranges(asked, PROMPT)
    assert tokens_of(ranges) == tokens_of(asked)
    flat = [number for pair in ranges for number in pair]
    assert flat == sorted(set(flat))  # ascending, none empty, none touching
    assert parse_ranges([number for pair in asked for number in pair], PROMPT) == ranges
    assert parse_ranges(ranges, PROMPT) == ranges


@given(st.lists(pairs, max_size=5), st.integers(0, PROMPT + 5), st.integers(0, PROMPT + 5))
def test_tokens_before_and_between_positions(asked: list[list[int]], first: int, end: int) -> None:
    ranges = parse_ranges(asked, PROMPT)
    assert count_before(ranges, end) == sum(token < end for token in tokens_of(ranges))
    found = ids_between(ranges, first, end)
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(t for t in tokens_of(ranges) if first <= t < end)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "must be start and end of one or more ranges of prompt tokens"),
        ("0,5", "must be start and end"),
        (5, "must be start and end"),
        ([5], "must be start and end"),
        ([0, 5, 9], "must be start and end"),
        ([0, 5.0], "must be start and end"),
        ([0, True], "must be start and end"),
        (["0", "5"], "must be start and end"),
        ([[0, 5], None], "must be start and end"),
        ([[[0, 5]]], "must be start and end"),
        ([5, 5], "has the range 5 to 5, but ranges must lie within the prompt's 60 tokens"),
        ([6, 5], "has the range 6 to 5"),
        ([-1, 5], "has the range -1 to 5"),
        ([0, 61], "has the range 0 to 61"),
        ([0, 5, 60, 61], "has the range 60 to 61"),
    ],
)
def test_what_is_no_range(value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_ranges(value, PROMPT)


def test_values_are_cut_short() -> None:
    assert shown("a") == "'a'"
    assert len(shown("a" * 999)) == 80


# --- where they go -------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    asked=st.lists(pairs, min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_kept_tokens_are_found_wherever_cuts_have_put_them(
    asked: list[list[int]], gaps: list[int], heads: int, layers: int, seed: int
) -> None:
    """Beside the record runs a storage that lists, per layer and head, which token lies where."""
    ranges = parse_ranges(asked, PROMPT)
    pinned_tokens, rng = PinnedTokens(ranges), np.random.default_rng(seed)
    storage: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(layers)]
    position = 0
    for gap in gaps:
        for layer in storage:
            for head in layer:
                head += range(position, position + gap)
        position += gap
        wanted = {token for token in tokens_of(ranges) if token < position}
        held = [len(layer[0]) for layer in storage]
        places = [pinned_tokens.find(i, position, held[i], heads) for i in range(layers)]
        stored = []
        for index, layer in enumerate(storage):
            assert places[index].shape == (heads, len(wanted))
            count = int(rng.integers(len(wanted), held[index] + 1))
            rows = []
            for number, head in enumerate(layer):
                mine = places[index][number].tolist()
                assert {head[place] for place in mine} == wanted
                rest = [place for place in range(held[index]) if place not in mine]
                chosen = mine + rng.permutation(rest)[: count - len(mine)].astype(int).tolist()
                rows.append(rng.permutation(chosen).astype(int).tolist())
                layer[number] = [head[place] for place in rows[-1]]
            stored.append(torch.tensor(rows, dtype=torch.int32).reshape(heads, count))
        pinned_tokens.follow(position, places, stored, held)


def test_a_kept_token_that_is_lost_is_an_error() -> None:
    pinned_tokens = PinnedTokens(((0, 2),))
    places = [pinned_tokens.find(0, 4, 4, 1)]
    with pytest.raises(RuntimeError, match="a pinned token has been evicted"):
        pinned_tokens.follow(4, places, [torch.tensor([[1, 2, 3]])], [4])


# --- that they are chosen ------------------------------------------------------------------------


def test_kept_tokens_are_worth_more_than_any_others() -> None:
    worth = torch.tensor([[5.0, -3.0, 0.0], [1.0, 2.0, 3.0]])
    places = torch.tensor([[1, 4], [0, 2]])  # one of them lies in the window
    found = rank_first(worth, places)
    inf = float("inf")
    assert found.tolist() == [[5.0, inf, 0.0], [inf, 2.0, inf]]
    assert worth[0, 1] == -3.0
    assert torch.equal(rank_first(worth, places[:, :0]), worth)


SIZE, LAYERS = 4, 5


def pinned(keep: list[int], heads: int, layers: int, count: int) -> PinnedPlaces:
    return PinnedPlaces([torch.tensor(keep, dtype=torch.int64).expand(heads, -1)] * layers, count)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Method, int, int, list[int], int, list[LayerScores]]:
    """A method, its prompt, pages per layer, kept tokens, how many count, and all scores."""
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    pages = draw(st.integers(-(-method.window // SIZE) + 1, 9))
    prompt = draw(st.integers(pages * SIZE + 1, 80))
    history = prompt - method.window
    room = pages * SIZE - method.window
    chosen = draw(st.sets(st.integers(0, history - 1), max_size=min(room, history)))
    window = draw(st.sets(st.integers(history, prompt - 1)))
    scores = score(draw(st.integers(0, 2**31)), LAYERS, history, ties=draw(st.booleans()))
    return method, prompt, pages, sorted(chosen | window), len(chosen), scores


def check_cascade(case: Any, expected: Selection) -> None:
    """It ends where one cut does."""
    method, prompt, pages, keep, count, scores = case
    geometry = geometry_of(LAYERS, SIZE, "block")
    blocks = -(-prompt // SIZE)
    at_once = layers_between_cuts(method, LAYERS)
    workspace = -(-at_once * blocks // LAYERS)
    cascade = LayerwiseEviction(
        method,
        geometry,
        Cut(prompt, pages),
        cached=[],
        workspace=range(1, workspace + 1),
        arena=range(200, 200 + pages),
        layers_per_division=at_once,
        pinned=pinned(keep, len(scores[0].tokens), LAYERS, count),
    )
    for layer in scores:
        cascade.take(layer)
    assert [len(table) for table in cascade.tables] == expected.pages.tolist()
    for mine, other in zip(cascade.stored(), expected.tokens, strict=True):
        assert torch.equal(mine.sort(dim=1).values, other.sort(dim=1).values)


@settings(max_examples=300)
@given(cases())
def test_kept_tokens_are_always_chosen_by_one_cut_and_by_a_cascade(case: Any) -> None:
    method, prompt, pages, keep, count, scores = case
    found = select_survivors(
        method, scores, capacity=pages * SIZE, block_size=SIZE, lengths=[prompt] * LAYERS,
        lap=lambda _: None, pinned=pinned(keep, len(scores[0].tokens), LAYERS, count),
    )  # fmt: skip
    counts, kept = found.pages, found.tokens
    assert counts.sum() == pages * LAYERS
    assert (counts * SIZE >= method.window + count).all()
    for layer, ids in enumerate(kept):
        assert ids.shape[1] == counts[layer] * SIZE
        assert all(set(keep) <= set(head.tolist()) for head in ids)
        assert all(len(set(head.tolist())) == len(head) for head in ids)
    if method.scorer.budgets_are_nested:
        check_cascade(case, found)


def test_a_layer_that_deserves_nothing_has_room_for_what_must_stay() -> None:
    scores = score(0, 3, 95, ties=False)
    scores[1] = LayerScores(
        scores[1].tokens, {"log_entropy": -np.inf, "log_shift": -np.inf, "preference": 0.0}
    )
    shape = {"pages_per_layer": 10, "block_size": SIZE, "lengths": 100}
    budgets = [
        page_budgets(METHODS["cake-1"], scores, pinned=keep, **shape).tolist()
        for keep in (0, 20, 35)
    ]
    assert [found[1] for found in budgets] == [2, 7, 10]
    assert all(sum(found) == 30 for found in budgets)


def test_a_methods_own_floor_leaves_that_room() -> None:
    """Also where the pool is too small for the floor of every layer."""
    method = DynamicKV(window=5, min_tokens=60)
    scores = score(1, 4, 95, ties=False)
    for layer in scores:
        layer.tokens.mul_(0.01)
    scores[0].tokens.add_(1.0)  # all winners are here
    found = page_budgets(
        method, scores, pages_per_layer=6, block_size=SIZE, lengths=100, pinned=19
    )  # fmt: skip
    assert found.tolist() == [6, 6, 6, 6]

"""Arena arithmetic, dealing of pages, and the arena's books against a naive model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_kvcompress.arena import (
    ArenaPlan,
    IntArray,
    IntegrityError,
    PageArena,
    PageGeometry,
    deal_pages,
)


def geometry_of(layers: int, num_blocks: int, block_size: int, *, outermost: str) -> PageGeometry:
    """The two layouts vLLM has: a region per layer, or all layers' pages side by side."""
    if outermost == "layer":
        return PageGeometry(np.arange(layers) * num_blocks, 1, num_blocks, block_size)
    return PageGeometry(np.arange(layers), layers, num_blocks, block_size)


@st.composite
def plans(draw: st.DrawFn) -> ArenaPlan:
    """Plans as the planner makes them: evicting ones, and those that keep every token."""
    size = draw(st.sampled_from([1, 4, 32]))
    prompt = draw(st.integers(1, 40 * size))
    blocks = -(-prompt // size)
    if draw(st.booleans()):
        return ArenaPlan(prompt, size, blocks, blocks, blocks * size - prompt)
    return ArenaPlan(prompt, size, blocks, draw(st.integers(1, blocks)), 0)


def split(draw: st.DrawFn, total: int, parts: int, least: int) -> IntArray:
    """Non-negative counts that add up to total, each at least ``least``."""
    free = total - least * parts
    cuts = sorted(draw(st.integers(0, free)) for _ in range(parts - 1))
    return np.diff(np.asarray([0, *cuts, free])) + least


# --- ArenaPlan -----------------------------------------------------------------------------------


@given(plans(), st.integers(0, 200))
def test_growth_is_the_fewest_blocks_that_hold_what_the_slack_does_not(
    plan: ArenaPlan, generated: int
) -> None:
    growth = plan.growth_blocks(plan.prompt_len + generated)
    assert growth * plan.block_size + plan.slack >= generated
    assert growth == 0 or (growth - 1) * plan.block_size + plan.slack < generated


def test_growth_takes_one_block_every_block_size_tokens() -> None:
    plan = ArenaPlan(prompt_len=100, block_size=8, prompt_blocks=13, arena_blocks=4, slack=0)
    grown = [plan.growth_blocks(100 + n) for n in range(18)]
    assert grown == [0, *[1] * 8, *[2] * 8, 3]
    # Tokens in the last page of a prompt that was kept whole come first.
    kept = ArenaPlan(prompt_len=100, block_size=8, prompt_blocks=13, arena_blocks=13, slack=4)
    assert [kept.growth_blocks(100 + n) for n in range(6)] == [0, 0, 0, 0, 0, 1]


@given(plans(), st.integers(0, 2000), st.booleans())
def test_blocks_before_the_end_of_the_prompt_are_those_of_plain_vllm(
    plan: ArenaPlan, tokens: int, released: bool
) -> None:
    tokens = min(tokens, plan.prompt_len - 1)
    assert plan.blocks_for(tokens, released) == -(-tokens // plan.block_size)


def test_blocks_at_and_after_the_end_of_the_prompt() -> None:
    plan = ArenaPlan(prompt_len=100, block_size=8, prompt_blocks=13, arena_blocks=4, slack=0)
    assert plan.blocks_for(99, released=False) == 13
    assert plan.blocks_for(100, released=False) == 13 + 4
    assert plan.blocks_for(101, released=False) == 13 + 4 + 1
    assert plan.blocks_for(100, released=True) == 4
    assert plan.blocks_for(109, released=True) == 4 + 2


@given(plans(), st.integers(0, 200), st.integers(1, 50))
def test_peak_is_never_exceeded(plan: ArenaPlan, generated: int, chunk: int) -> None:
    end = plan.prompt_len + generated
    chunks = range(0, plan.prompt_len, chunk)
    held = [plan.blocks_for(min(start + chunk, plan.prompt_len), False) for start in chunks]
    if generated:
        # Async scheduling: one more step is planned before the compressing one was processed.
        held.append(plan.blocks_for(plan.prompt_len + 1, released=False))
    held += [plan.blocks_for(plan.prompt_len + n, released=True) for n in range(generated + 1)]
    # Reserving all growth on top of both copies would always do; more would waste the pool.
    at_worst = plan.prompt_blocks + plan.arena_blocks + plan.growth_blocks(end)
    assert max(held) <= plan.peak_blocks(end) <= at_worst


# --- deal_pages ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_every_page_is_dealt_once_and_own_pages_first(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 6), "layers")
    outermost = data.draw(st.sampled_from(["layer", "block"]), "outermost")
    geometry = geometry_of(layers, 20, 4, outermost=outermost)
    blocks = data.draw(st.lists(st.integers(0, 19), unique=True, max_size=8), "blocks")
    counts = data.draw(st.composite(lambda d: split(d, len(blocks) * layers, layers, 0))())
    dealt = deal_pages(geometry, blocks, counts)
    shuffled = deal_pages(geometry, blocks, counts, shuffle=True)
    for pages in (dealt, shuffled):
        assert [len(p) for p in pages] == counts.tolist()
        every = np.sort(np.concatenate(pages)) if blocks else np.zeros(0, dtype=np.int64)
        np.testing.assert_array_equal(every, np.sort(geometry.all_pages(blocks).reshape(-1)))
    for layer, held in enumerate(dealt):
        own = geometry.pages(layer, blocks)
        mine = min(int(counts[layer]), len(blocks))
        np.testing.assert_array_equal(held[:mine], own[:mine])


def test_equal_counts_leave_every_layer_its_own_slice() -> None:
    geometry = geometry_of(3, 10, 4, outermost="block")
    dealt = deal_pages(geometry, [7, 2], np.full(3, 2))
    np.testing.assert_array_equal(np.stack(dealt), geometry.all_pages([7, 2]))


def test_shuffling_moves_pages_and_is_the_same_every_time() -> None:
    geometry = geometry_of(8, 40, 4, outermost="layer")
    blocks, counts = list(range(1, 9)), np.full(8, 8)
    first, second = (deal_pages(geometry, blocks, counts, shuffle=True) for _ in range(2))
    np.testing.assert_array_equal(np.stack(first), np.stack(second))
    own = geometry.all_pages(blocks)
    moved = sum(not set(p.tolist()) <= set(o.tolist()) for p, o in zip(first, own, strict=True))
    assert moved == 8


@pytest.mark.parametrize("counts", [[2, 2, 1], [3, 3, 1], [7, 0, -1]])
def test_counts_that_do_not_add_up_are_refused(counts: list[int]) -> None:
    geometry = geometry_of(3, 10, 4, outermost="layer")
    with pytest.raises(ValueError, match="6 pages cannot be dealt as"):
        deal_pages(geometry, [1, 2], np.asarray(counts))


# --- PageArena -----------------------------------------------------------------------------------

LAYERS, BLOCKS, SIZE = 3, 24, 4


class ArenaMachine(RuleBasedStateMachine):
    """The arena beside a dict of page lists, which can hardly be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.geometry = geometry_of(LAYERS, BLOCKS, SIZE, outermost="block")
        self.arena = PageArena(self.geometry)
        self.free = list(range(1, BLOCKS))
        self.blocks: dict[str, list[int]] = {}
        self.tables: dict[str, list[list[int]]] = {}
        self.kept: dict[str, list[int]] = {}
        self.made = 0

    @precondition(lambda self: len(self.free) >= 2)
    @rule(data=st.data(), slack=st.integers(0, SIZE - 1))
    def admit(self, data: st.DataObject, slack: int) -> None:
        count = data.draw(st.integers(1, min(4, len(self.free))))
        order = data.draw(st.permutations(self.free))
        blocks, self.free = list(order[:count]), list(order[count:])
        counts = data.draw(st.composite(lambda d: split(d, count * LAYERS, LAYERS, 1))())
        pages = deal_pages(self.geometry, blocks, counts)
        name = f"r{self.made}"
        self.made += 1
        plan = ArenaPlan(50, SIZE, 13, count, slack)
        slot = self.arena.admit(name, plan, blocks, pages)
        assert slot == self.arena.slot(name)
        self.blocks[name] = blocks
        self.tables[name] = [p.tolist() for p in pages]
        self.kept[name] = [len(p) * SIZE - slack for p in pages]

    @precondition(lambda self: self.blocks and self.free)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.blocks)))
        new = [self.free.pop() for _ in range(data.draw(st.integers(1, min(3, len(self.free)))))]
        assert not self.arena.can_grow(name, self.blocks[name])
        assert self.arena.can_grow(name, self.blocks[name] + new)
        self.arena.grow(name, self.blocks[name] + new)
        self.blocks[name] += new
        for layer, table in enumerate(self.tables[name]):
            table += [int(self.geometry.origin[layer]) + b * self.geometry.step for b in new]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.blocks)))
        self.arena.drop(name)
        self.free += self.blocks.pop(name)
        del self.tables[name], self.kept[name]

    @rule(slots=st.integers(0, 12), pages=st.integers(0, 12))
    def reserve(self, slots: int, pages: int) -> None:
        self.arena._reserve(slots=slots, pages=pages)

    @rule()
    def drop_a_stranger(self) -> None:
        version = self.arena.version
        self.arena.drop("nobody")
        assert self.arena.version == version

    @invariant()
    def agrees(self) -> None:
        arena = self.arena
        arena.check_integrity(self.blocks)
        assert sorted(arena.request_ids()) == sorted(self.blocks)
        assert len(arena) == len(self.blocks)
        slots = [arena.slot(name) for name in self.blocks]
        assert len(set(slots)) == len(slots)
        np.testing.assert_array_equal(arena.slots(self.blocks), slots)
        for name, tables in self.tables.items():
            assert name in arena
            lengths = [len(t) for t in tables]
            assert arena.pages_per_layer(name).tolist() == lengths
            slot = arena.slot(name)
            for layer, table in enumerate(tables):
                assert arena.tables[layer, slot, : lengths[layer]].tolist() == table
            assert (arena.shift[:, slot] + 50).tolist() == self.kept[name]


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def arena_with(requests: dict[str, list[int]]) -> PageArena:
    """Requests with the given arena blocks, each layer its own pages."""
    arena = PageArena(geometry_of(LAYERS, BLOCKS, SIZE, outermost="layer"))
    for name, blocks in requests.items():
        pages = deal_pages(arena.geometry, blocks, np.full(LAYERS, len(blocks)))
        arena.admit(name, ArenaPlan(50, SIZE, 13, len(blocks), 0), blocks, pages)
    return arena


def test_admitting_twice_or_with_wrong_pages_is_refused_and_changes_nothing() -> None:
    arena = arena_with({"a": [3, 4]})
    pages = deal_pages(arena.geometry, [5, 6], np.full(LAYERS, 2))
    plan = ArenaPlan(50, SIZE, 13, 2, 0)
    with pytest.raises(ValueError, match="request a is in the arena already"):
        arena.admit("a", plan, [5, 6], pages)
    with pytest.raises(ValueError, match="request b: 6 pages of 3 layers in 1 blocks"):
        arena.admit("b", plan, [5], pages)
    with pytest.raises(ValueError, match="request b: 5 pages of 3 layers in 2 blocks"):
        arena.admit("b", plan, [5, 6], [pages[0][:1], *pages[1:]])
    assert arena.request_ids() == ["a"]
    arena.check_integrity({"a": [3, 4]})


def test_growing_from_other_blocks_is_refused() -> None:
    arena = arena_with({"a": [3, 4]})
    with pytest.raises(ValueError, match="its blocks changed"):
        arena.grow("a", [4, 3, 5])
    assert arena.pages_per_layer("a").tolist() == [2] * LAYERS


def double_page(arena: PageArena) -> None:
    arena.tables[1, arena.slot("a"), 0] = arena.tables[1, arena.slot("a"), 1]


def foreign_page(arena: PageArena) -> None:
    arena.tables[0, arena.slot("a"), 1] = arena.geometry.pages(0, [20])[0]


def missing_page(arena: PageArena) -> None:
    arena.used[2, arena.slot("a")] -= 1


def wrong_length(arena: PageArena) -> None:
    arena.shift[1, arena.slot("a")] += 1


def shared_block(arena: PageArena) -> None:
    blocks = [4, 9]
    pages = deal_pages(arena.geometry, blocks, np.full(LAYERS, 2))
    arena.admit("thief", ArenaPlan(50, SIZE, 13, 2, 0), blocks, pages)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (double_page, "request a does not hold each of its pages once"),
        (foreign_page, "request a does not hold each of its pages once"),
        (missing_page, "request a does not hold each of its pages once"),
        (wrong_length, "request a: lengths and pages disagree"),
        (shared_block, "block 4 is held by a and thief"),
    ],
)
def test_corruption_is_detected(corrupt: Callable[[PageArena], None], message: str) -> None:
    arena = arena_with({"a": [3, 4], "b": [7]})
    arena.check_integrity()
    corrupt(arena)
    with pytest.raises(IntegrityError, match=message):
        arena.check_integrity()


@pytest.mark.parametrize("said", [{}, {"a": [3]}, {"a": [4, 3]}, {"a": [3, 4, 5]}])
def test_disagreement_with_the_scheduler_is_detected(said: dict[str, list[int]]) -> None:
    arena = arena_with({"a": [3, 4]})
    with pytest.raises(IntegrityError, match="request a: arena blocks"):
        arena.check_integrity(said)

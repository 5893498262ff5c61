"""Dealing of pages, and the arena against a naive model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_kvcompress.paging.arena import (
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


def split(draw: st.DrawFn, total: int, parts: int, least: int) -> IntArray:
    """Non-negative counts that add up to total, each at least ``least``."""
    free = total - least * parts
    cuts = sorted(draw(st.integers(0, free)) for _ in range(parts - 1))
    return np.diff(np.asarray([0, *cuts, free])) + least


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
        self.dealt: dict[str, list[int]] = {}
        self.growth: dict[str, int] = {}
        self.staged: dict[str, list[list[int]]] = {}
        self.made = 0

    @precondition(lambda self: len(self.free) >= 2)
    @rule(data=st.data(), slack=st.integers(0, SIZE - 1), column=st.none() | st.integers(0, 90))
    def admit(self, data: st.DataObject, slack: int, column: int | None) -> None:
        count = data.draw(st.integers(1, min(4, len(self.free))))
        order = data.draw(st.permutations(self.free))
        blocks, self.free = list(order[:count]), list(order[count:])
        counts = data.draw(st.composite(lambda d: split(d, count * LAYERS, LAYERS, 1))())
        pages = deal_pages(self.geometry, blocks, counts)
        name = f"r{self.made}"
        self.made += 1
        self.arena.admit(name, blocks, pages, num_tokens=50, slack=slack, growth_column=column)
        self.blocks[name] = blocks
        self.dealt[name] = counts.tolist()
        # The prompt's 13 blocks and the arena's come before the first growth block, unless the
        # request was given others in between.
        self.growth[name] = 13 + count if column is None else column
        self.tables[name] = [p.tolist() for p in pages]
        self.kept[name] = [len(p) * SIZE - slack for p in pages]

    @precondition(lambda self: self.blocks and self.free)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.blocks)))
        new = [self.free.pop() for _ in range(data.draw(st.integers(1, min(3, len(self.free)))))]
        self.arena.grow({name: new})
        self.blocks[name] += new
        for layer, table in enumerate(self.tables[name]):
            table += [int(self.geometry.origin[layer]) + b * self.geometry.step for b in new]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.blocks)))
        self.arena.drop(name)
        self.free += self.blocks.pop(name)
        del self.tables[name], self.kept[name], self.dealt[name], self.growth[name]

    @rule(data=st.data(), length=st.integers(1, 6))
    def stage(self, data: st.DataObject, length: int) -> None:
        """Tables for one step in which layers reuse each other's pages."""
        page = st.integers(0, LAYERS * BLOCKS - 1)
        table = st.lists(page, min_size=length, max_size=length)
        name = f"s{self.made}"
        self.made += 1
        self.staged[name] = [data.draw(table) for _ in range(LAYERS)]
        serials = self.arena.serial.copy()
        self.arena.stage(name, [np.asarray(ids) for ids in self.staged[name]])
        assert self.arena.serial[self.arena.slot(name)] > serials.max(initial=0)

    @precondition(lambda self: self.staged)
    @rule(data=st.data())
    def unstage(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.staged)))
        self.arena.drop(name)
        del self.staged[name]

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
        names = [*self.blocks, *self.staged]
        slots = [arena.slot(name) for name in names]
        assert len(set(slots)) == len(slots)
        np.testing.assert_array_equal(arena.slots(names), slots)
        for name, tables in self.tables.items():
            assert name in arena
            lengths = [len(t) for t in tables]
            slot = arena.slot(name)
            assert arena.used[:, slot].tolist() == lengths
            for layer, table in enumerate(tables):
                assert arena.tables[layer, slot, : lengths[layer]].tolist() == table
            assert [ids.tolist() for ids in arena.layer_pages(name)] == tables
            assert arena.dealt_pages(name).tolist() == self.dealt[name]
            assert arena.lengths(name, 50).tolist() == self.kept[name]
            assert arena.lengths(name, 57).tolist() == [kept + 7 for kept in self.kept[name]]
            assert arena.growth_column[slot] == self.growth[name]
        for name, tables in self.staged.items():
            assert [ids.tolist() for ids in arena.layer_pages(name)] == tables
            assert arena.lengths(name, 21).tolist() == [21] * LAYERS  # nothing is evicted yet


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=30, stateful_step_count=25)


def arena_with(requests: dict[str, list[int]]) -> PageArena:
    """Requests with the given arena blocks, each layer its own pages."""
    arena = PageArena(geometry_of(LAYERS, BLOCKS, SIZE, outermost="layer"))
    for name, blocks in requests.items():
        pages = deal_pages(arena.geometry, blocks, np.full(LAYERS, len(blocks)))
        arena.admit(name, blocks, pages, num_tokens=50)
    return arena


def test_admitting_twice_or_with_wrong_pages_is_refused_and_changes_nothing() -> None:
    arena = arena_with({"a": [3, 4]})
    pages = deal_pages(arena.geometry, [5, 6], np.full(LAYERS, 2))
    with pytest.raises(ValueError, match="request a is in the arena already"):
        arena.admit("a", [5, 6], pages, num_tokens=50)
    with pytest.raises(ValueError, match="request b: 6 pages of 3 layers in 1 blocks"):
        arena.admit("b", [5], pages, num_tokens=50)
    with pytest.raises(ValueError, match="request b: 5 pages of 3 layers in 2 blocks"):
        arena.admit("b", [5, 6], [pages[0][:1], *pages[1:]], num_tokens=50)
    assert "b" not in arena
    arena.check_integrity({"a": [3, 4]})


def test_what_is_handed_out_is_a_copy() -> None:
    arena = arena_with({"a": [3, 4]})
    for taken in (*arena.layer_pages("a"), arena.dealt_pages("a"), arena.lengths("a", 50)):
        taken += 1
    arena.slots(["a"])[0] += 1
    arena.check_integrity({"a": [3, 4]})
    assert arena.dealt_pages("a").tolist() == [2] * LAYERS


def test_a_request_is_staged_once_and_admitted_after_it_was_dropped() -> None:
    arena = arena_with({"a": [3, 4]})
    shared = [np.array([7, 8, 9])] * LAYERS
    with pytest.raises(ValueError, match="request a is in the arena already"):
        arena.stage("a", shared)
    arena.stage("b", shared)
    with pytest.raises(ValueError, match="request b is in the arena already"):
        arena.stage("b", shared)
    # Layers share its pages and it has no blocks: only the others are checked.
    arena.check_integrity({"a": [3, 4]})
    pages = deal_pages(arena.geometry, [5, 6], np.full(LAYERS, 2))
    with pytest.raises(ValueError, match="request b is in the arena already"):
        arena.admit("b", [5, 6], pages, num_tokens=50)
    arena.drop("b")
    arena.admit("b", [5, 6], pages, num_tokens=50)
    arena.check_integrity({"a": [3, 4], "b": [5, 6]})
    assert arena.dealt_pages("b").tolist() == [2] * LAYERS


def test_requests_grow_together_as_they_do_alone() -> None:
    together, alone = (arena_with({"a": [3, 4], "b": [5, 6], "c": [7]}) for _ in range(2))
    new = {"a": [8], "b": [], "c": [9, 10, 11]}
    together.grow(new)
    for name, blocks in new.items():
        for block in blocks:
            alone.grow({name: [block]})
    for name in new:
        pages, expected = together.layer_pages(name), alone.layer_pages(name)
        assert [ids.tolist() for ids in pages] == [ids.tolist() for ids in expected]
    together.check_integrity({"a": [3, 4, 8], "b": [5, 6], "c": [7, 9, 10, 11]})


def test_growing_by_a_block_of_another_request_is_found() -> None:
    arena = arena_with({"a": [3, 4], "b": [5, 6]})
    arena.grow({"a": [5]})
    with pytest.raises(IntegrityError, match="block 5 is held by"):
        arena.check_integrity()


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
    arena.admit("thief", blocks, pages, num_tokens=50)


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

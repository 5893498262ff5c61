"""Per-layer tables of a step against a per-row, per-layer, per-token reference.

Both builders: the one for the CPU backend, and the one that fills a device's buffers (here through
the torch twin of its kernel; the kernel is compared with its twin in tests/kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.arena import ArenaPlan, PageArena, PageGeometry, deal_pages
from vllm_kvcompress.device_tables import DeviceTableBuilder
from vllm_kvcompress.tables import (
    BatchRows,
    LayerTables,
    StepTableBuilder,
    TableBuilder,
    TableLimits,
)

NUM_BLOCKS = 200
WIDTH = 64
LIMITS = TableLimits(rows=8, width=WIDTH, tokens=80)

Make = Callable[[PageArena], StepTableBuilder]


def on_device(arena: PageArena) -> DeviceTableBuilder:
    return DeviceTableBuilder(arena, LIMITS, torch.device("cpu"), implementation="torch")


both_builders = pytest.mark.parametrize("make", [TableBuilder, on_device], ids=["cpu", "device"])


@dataclass
class Row:
    """One request as the reference sees it: pages per layer where it is compressed.

    ``length`` is logical and includes the step's ``tokens``; ``blocks`` is what the runner's
    block table holds, meaningless for compressed rows.
    """

    length: int
    tokens: int
    blocks: list[int]
    name: str | None = None
    prompt: int = 0
    kept: tuple[int, ...] = ()
    pages: tuple[list[int], ...] = ()


class World:
    """An arena, and beside it everything as plain lists."""

    def __init__(self, layers: int, size: int, outermost: str) -> None:
        origin = np.arange(layers) * (NUM_BLOCKS if outermost == "layer" else 1)
        step = 1 if outermost == "layer" else layers
        self.geometry = PageGeometry(origin, step, NUM_BLOCKS, size)
        self.arena = PageArena(self.geometry)
        self.free = list(range(1, NUM_BLOCKS))
        self.size, self.layers = size, layers

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def page(self, layer: int, block: int) -> int:
        """Where plain vLLM's slice of a block lies in the flat view."""
        return int(self.geometry.origin[layer]) + block * self.geometry.step

    def admit(self, name: str, prompt: int, counts: list[int], slack: int = 0) -> Row:
        blocks = self.take(sum(counts) // self.layers)
        dealt = deal_pages(self.geometry, blocks, np.asarray(counts))
        plan = ArenaPlan(prompt, self.size, -(-prompt // self.size), len(blocks), slack)
        self.arena.admit(name, plan, blocks, dealt)
        kept = tuple(c * self.size - slack for c in counts)
        pages = tuple([int(p) for p in part] for part in dealt)
        return Row(prompt, 0, blocks, name, prompt, kept, pages)

    def feed(self, row: Row, tokens: int) -> None:
        """Append tokens to a compressed row, with growth blocks where they are due."""
        row.length += tokens
        row.tokens = tokens
        while (row.kept[0] + row.length - row.prompt) > len(row.pages[0]) * self.size:
            assert row.name is not None
            (block,) = self.take(1)
            row.blocks.append(block)
            self.arena.grow(row.name, row.blocks)
            for layer, pages in enumerate(row.pages):
                pages.append(self.page(layer, block))

    def plain(self, length: int, tokens: int) -> Row:
        return Row(length, tokens, self.take(-(-length // self.size)))

    def batch(self, rows: list[Row], padding: int = 0) -> BatchRows:
        """What the model runner hands over: logical lengths, block ids, logical slots."""
        table = np.full((len(rows), WIDTH), 7, dtype=np.int32)
        slots: list[int] = []
        for index, row in enumerate(rows):
            # A compressed row still begins with its prompt's blocks, which are others' by now.
            first = 0 if row.name is None else -(-row.prompt // self.size)
            table[index, first : first + len(row.blocks)] = row.blocks
            for position in range(row.length - row.tokens, row.length):
                # The runner knows nothing of the arena: for a compressed row this is nonsense.
                block = int(table[index, min(position // self.size, WIDTH - 1)])
                slots.append(block * self.size + position % self.size)
        compressed = [i for i, row in enumerate(rows) if row.name is not None]
        names = [row.name for row in rows if row.name is not None]
        return BatchRows(
            block_table=torch.from_numpy(table),
            seq_lens=torch.tensor([r.length for r in rows], dtype=torch.int32),
            query_start=torch.tensor(
                [0, *np.cumsum([r.tokens for r in rows]).tolist()], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
            rows=np.asarray(compressed, dtype=np.int64),
            slots=self.arena.slots(names),
            seq_lens_bound=np.asarray([r.length + 1 for r in rows]),
        )

    def check(self, rows: list[Row], padding: int, built: LayerTables) -> None:
        """Compare with what every layer, row and token should have."""
        for layer in range(self.layers):
            slots: list[int] = []
            for index, row in enumerate(rows):
                if row.name is None:
                    pages = [self.page(layer, b) for b in row.blocks]
                    held = row.length
                else:
                    pages = row.pages[layer]
                    held = row.kept[layer] + row.length - row.prompt
                assert built.seq_lens[layer, index] == held
                needed = -(-held // self.size)
                assert built.block_tables[layer, index, :needed].tolist() == pages[:needed]
                for position in range(held - row.tokens, held):
                    page = pages[position // self.size]
                    slots.append(page * self.size + position % self.size)
            assert built.slot_mapping[layer].tolist() == slots + [-1] * padding
        assert built.block_tables.dtype == torch.int32
        assert built.seq_lens.dtype == torch.int32
        assert built.slot_mapping.dtype == torch.int64
        assert built.slot_mapping[0].is_contiguous()
        if built.max_lens is not None:
            assert built.max_lens == [int(n) + 1 for n in built.seq_lens.max(dim=1).values]


@st.composite
def uneven(draw: st.DrawFn, layers: int) -> list[int]:
    """Pages per layer: at least one each, a whole number of blocks in all."""
    blocks = draw(st.integers(1, 3))
    free = (blocks - 1) * layers
    cuts = sorted(draw(st.integers(0, free)) for _ in range(layers - 1))
    return (np.diff(np.asarray([0, *cuts, free])) + 1).tolist()


@both_builders
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_tables_equal_the_reference(make: Make, data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4), "layers")
    size = data.draw(st.sampled_from([2, 4]), "block size")
    world = World(layers, size, data.draw(st.sampled_from(["layer", "block"]), "outermost"))
    rows: list[Row] = []
    for index in range(data.draw(st.integers(1, 5), "requests")):
        if index and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 20))
            # One token is a decode row, more are a prefill chunk, perhaps not the first.
            rows.append(world.plain(length, data.draw(st.integers(1, length))))
        else:
            counts = data.draw(uneven(layers))
            prompt = data.draw(st.integers(max(counts) * size, 60))
            rows.append(world.admit(f"r{index}", prompt, counts, data.draw(st.integers(0, 1))))
    builder = make(world.arena)
    for _ in range(data.draw(st.integers(1, 3), "steps")):
        for row in rows:
            if row.name is not None:
                # A request resumed after a preemption replays several tokens in one step.
                world.feed(row, data.draw(st.sampled_from([1, 1, 2, 7])))
        batch_rows = data.draw(st.permutations(rows))
        padding = data.draw(st.integers(0, 3))
        world.check(batch_rows, padding, builder.build(world.batch(batch_rows, padding)))
        world.arena.check_integrity({r.name: r.blocks for r in rows if r.name is not None})


@both_builders
@pytest.mark.parametrize("outermost", ["layer", "block"])
def test_plain_rows_beside_a_compressed_one_keep_plain_vllms_slots(
    make: Make, outermost: str
) -> None:
    world = World(3, 4, outermost)
    compressed = world.admit("a", 40, [1, 2, 3])
    world.feed(compressed, 1)
    prefill, decode = world.plain(11, 7), world.plain(9, 1)
    batch = world.batch([prefill, compressed, decode], padding=2)
    built = make(world.arena).build(batch)
    logical = batch.slot_mapping
    theirs = [0, 1, 2, 3, 4, 5, 6, 8]  # token 7 is the compressed row's
    # Layer l's own cache is every step-th page of the flat view from origin[l] on.
    flat = torch.arange(3 * NUM_BLOCKS * 4).view(3 * NUM_BLOCKS, 4)
    for layer in range(3):
        start, step = int(world.geometry.origin[layer]), world.geometry.step
        own = flat[start::step][:NUM_BLOCKS].reshape(-1)
        torch.testing.assert_close(built.slot_mapping[layer][theirs], own[logical[theirs]])
        assert built.slot_mapping[layer, 9:].tolist() == [-1, -1]
        for row in (0, 2):
            blocks = batch.block_table[row, :3].long()
            pages = built.block_tables[layer, row, :3].long()
            torch.testing.assert_close(flat[pages], own.view(NUM_BLOCKS, 4)[blocks])
        assert built.seq_lens[layer, [0, 2]].tolist() == [11, 9]


@both_builders
def test_layers_of_one_request_have_their_own_lengths(make: Make) -> None:
    world = World(3, 4, "layer")
    row = world.admit("a", 40, [1, 2, 3])
    world.feed(row, 1)
    built = make(world.arena).build(world.batch([row]))
    assert built.seq_lens[:, 0].tolist() == [5, 9, 13]
    # Their next slot is the first of the same growth block in each layer's own page.
    first = [world.page(layer, row.blocks[-1]) * 4 for layer in range(3)]
    assert built.slot_mapping[:, 0].tolist() == first


def test_tables_are_reused_while_batch_and_arena_stay_the_same() -> None:
    world = World(2, 4, "block")
    rows = [world.admit("a", 30, [1, 3]), world.admit("b", 30, [2, 2])]
    builder = TableBuilder(world.arena)
    for row in rows:
        world.feed(row, 1)
    first = builder.build(world.batch(rows))
    for row in rows:
        world.feed(row, 1)
    second = builder.build(world.batch(rows))
    assert second.block_tables is first.block_tables
    # Only the tables are: lengths and slots move with every token.
    world.check(rows, 0, second)


@both_builders
def test_tables_are_refreshed_when_a_request_grows(make: Make) -> None:
    world = World(2, 4, "block")
    row = world.admit("a", 30, [1, 3])
    builder = make(world.arena)
    for _ in range(10):
        world.feed(row, 1)
        world.check([row], 0, builder.build(world.batch([row])))
    assert len(row.blocks) == 2 + 3


@both_builders
def test_tables_are_refreshed_when_a_slot_gets_another_request(make: Make) -> None:
    world = World(2, 4, "layer")
    old = world.admit("a", 30, [1, 3])
    world.feed(old, 1)
    builder = make(world.arena)
    world.check([old], 0, builder.build(world.batch([old])))
    slot = world.arena.slot("a")
    world.arena.drop("a")
    new = world.admit("b", 34, [3, 1])
    assert world.arena.slot("b") == slot
    world.feed(new, 1)
    world.check([new], 0, builder.build(world.batch([new])))


@both_builders
def test_tables_are_refreshed_when_rows_change_places_or_leave(make: Make) -> None:
    world = World(2, 4, "layer")
    rows = [world.admit("a", 30, [1, 3]), world.admit("b", 34, [3, 1])]
    plain = world.plain(6, 1)
    for row in rows:
        world.feed(row, 1)
    builder = make(world.arena)
    for batch in (rows, rows[::-1], rows[:1], [rows[0], plain], [plain, rows[0]], rows):
        world.check(batch, 0, builder.build(world.batch(batch)))


@both_builders
def test_a_chunk_of_another_prompt_growing_beside_a_compressed_row(make: Make) -> None:
    # Same rows and arena version twice: only the plain row's blocks differ.
    world = World(2, 4, "block")
    row = world.admit("a", 30, [2, 2])
    builder = make(world.arena)
    for length in (4, 8, 12):
        world.feed(row, 1)
        batch = [row, world.plain(length, 4)]
        world.check(batch, 0, builder.build(world.batch(batch)))


def test_a_devices_buffers_never_move() -> None:
    """A captured graph reads the addresses of the moment; slots and pages of the arena may grow."""
    world = World(2, 4, "layer")
    builder = on_device(world.arena)
    captured = builder.capture(torch.ones(6, dtype=torch.int32), 6)
    assert captured.block_tables.eq(0).all()
    assert captured.seq_lens.eq(1).all()
    assert captured.slot_mapping.eq(-1).all()
    rows = []
    for index in range(6):
        row = world.admit(f"r{index}", 100 + index, [2 + index, 2 + index])
        world.feed(row, 1)
        rows.append(row)
        built = builder.build(world.batch(rows))
        world.check(rows, 0, built)
        for now, then in (
            (built.block_tables, captured.block_tables),
            (built.seq_lens, captured.seq_lens),
            (built.slot_mapping, captured.slot_mapping),
        ):
            assert now.data_ptr() == then.data_ptr()
            assert now[1].data_ptr() == then[1].data_ptr()
    # What was captured for six rows holds what the last step filled in.
    world.check(rows, 0, captured)


def test_a_replayed_batch_may_have_no_compressed_row() -> None:
    world = World(2, 4, "block")
    rows = [world.plain(9, 1), world.plain(4, 1)]
    builder = on_device(world.arena)
    world.check(rows, 2, builder.build(world.batch(rows, padding=2)))


def test_warming_up_leaves_an_empty_row() -> None:
    world = World(2, 4, "block")
    builder = on_device(world.arena)
    builder.warm_up()
    built = builder.capture(torch.zeros(1, dtype=torch.int32), 0)
    assert built.seq_lens.tolist() == [[0], [0]]
    rows = [world.plain(9, 1)]
    world.check(rows, 0, builder.build(world.batch(rows)))


def test_a_batch_beyond_the_limits_is_refused() -> None:
    world = World(2, 4, "block")
    rows = [world.plain(1, 1) for _ in range(LIMITS.rows + 1)]
    with pytest.raises(ValueError, match="a batch of 9 rows and 9 tokens exceeds"):
        on_device(world.arena).build(world.batch(rows))

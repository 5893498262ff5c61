"""Per-layer tables of a step against a per-row, per-layer, per-token reference.

Both builders: the one for the CPU backend, and the one that fills a device's buffers (here through
the torch twin of its kernel; the kernel is compared with its twin in tests/kernels).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_kernels.transfer import upload
from tests.support.table_world import (
    LIMITS,
    NUM_BLOCKS,
    WIDTH,
    Make,
    Row,
    World,
    both_builders,
    on_device,
)
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_tables import TableBuilder, TableLimits


@st.composite
def uneven(draw: st.DrawFn, layers: int) -> list[int]:
    """Pages per layer: at least one each, a whole number of blocks in all."""
    blocks = draw(st.integers(1, 3))
    free = (blocks - 1) * layers
    cuts = sorted(draw(st.integers(0, free)) for _ in range(layers - 1))
    return (np.diff(np.asarray([0, *cuts, free])) + 1).tolist()


@both_builders
@settings(max_examples=200)
@given(data=st.data())
def test_tables_equal_the_reference(make: Make, data: st.DataObject) -> None:
    """Steps of one builder: rows come, grow, are cut again, change places, pause and leave."""
    layers = data.draw(st.integers(1, 4), "layers")
    size = data.draw(st.sampled_from([2, 8]), "block size")
    world = World(layers, size, data.draw(st.sampled_from(["layer", "block"]), "outermost"))
    builder = make(world.arena)
    live: list[Row] = []
    for step in range(data.draw(st.integers(1, 6), "steps")):
        # In a quiet step tables may be reused: nothing but the batch differs.
        quiet = bool(live) and data.draw(st.booleans(), "quiet")
        if not quiet and len(live) > 1 and data.draw(st.booleans(), "leaves"):
            world.arena.drop(str(live.pop().name))
        while not quiet and len(live) < 3 and (not live or data.draw(st.booleans(), "comes")):
            counts = data.draw(uneven(layers))
            prompt = max(counts) * size + data.draw(st.integers(0, 30))
            name = f"r{step}.{len(live)}"
            live.append(world.admit(name, prompt, counts, data.draw(st.integers(0, 1))))
        if not quiet and data.draw(st.booleans(), "cut"):
            # To its own pages, or to those of other blocks.
            world.cut_again(data.draw(st.sampled_from(live)), data.draw(st.none() | uneven(layers)))
        for row in live:
            # A request resumed after a preemption replays several tokens in one step.
            world.feed(row, 1 if quiet else data.draw(st.sampled_from([1, 2, 7])))
        running = data.draw(st.just(len(live)) | st.integers(1, len(live)), "running")
        rows = live[:running]
        for length in data.draw(st.just([]) | st.lists(st.integers(1, 20), max_size=2), "plain"):
            # One token is a decode row, more are a prefill chunk, perhaps not the first.
            rows.append(world.plain(length, data.draw(st.integers(1, length))))
        batch_rows = data.draw(st.permutations(rows))
        padding = data.draw(st.integers(0, 3))
        world.check(batch_rows, padding, builder.build(world.batch(batch_rows, padding)))
        world.arena.check_integrity({str(row.name): row.blocks for row in live})


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
@pytest.mark.parametrize(("cached", "at_once"), [(0, 1), (2, 2)])
def test_a_prompt_whose_layers_share_pages_for_a_step(
    make: Make, cached: int, at_once: int
) -> None:
    world = World(4, 4, "block")
    old = world.admit("a", 30, [1, 2, 1, 4])
    builder = make(world.arena)
    world.feed(old, 1)
    staged = world.stage("b", 22, cached, at_once)
    assert staged.tokens == 22 - 4 * cached
    batch = [staged, old, world.plain(6, 1)]
    world.check(batch, 1, builder.build(world.batch(batch, padding=1)))
    # After the step it is admitted as any other, perhaps to the same slot.
    world.arena.drop("b")
    new = world.admit("b", 22, [3, 2, 1, 2])
    for _ in range(3):
        world.feed(old, 1)
        world.feed(new, 1)
        world.check([new, old], 0, builder.build(world.batch([new, old])))


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


def test_requests_admitted_in_one_step_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3, 4, "layer")
    builder = on_device(world.arena)
    sent: list[int] = []

    def counted(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(host.numel())
        return upload(host, device)

    monkeypatch.setattr("vllm_kvcompress.paging.device_page_tables.upload", counted)
    rows = [world.admit(f"r{i}", 30, counts) for i, counts in enumerate(([1, 2, 3], [2, 2, 2]))]
    for row in rows:
        world.feed(row, 1)
    world.check(rows, 0, builder.build(world.batch(rows)))
    assert len(sent) == 2  # what the arena knows of both, and their slots
    for row in rows:
        world.feed(row, 1)
    world.check(rows, 0, builder.build(world.batch(rows)))
    assert len(sent) == 2


def test_a_layers_views_are_made_once_for_batches_of_one_size() -> None:
    world = World(3, 4, "layer")
    builder = on_device(world.arena)
    row = world.admit("a", 30, [1, 2, 3])
    views = []
    for _ in range(2):
        world.feed(row, 1)
        tables = builder.build(world.batch([row]))
        world.check([row], 0, tables)
        views.append(tables.by_layer)
        for layer, (block_table, seq_lens, slots) in enumerate(tables.by_layer):
            assert block_table.data_ptr() == tables.block_tables[layer].data_ptr()
            assert torch.equal(seq_lens, tables.seq_lens[layer])
            assert torch.equal(slots, tables.slot_mapping[layer])
    assert views[0] is views[1]
    assert builder.build(world.batch([row, world.plain(5, 1)])).by_layer is not views[0]


def test_every_layers_tables_begin_where_vllms_do() -> None:
    """vLLM's Triton attention is compiled for addresses that are multiples of 16."""
    world = World(5, 4, "layer")
    row = world.admit("a", 40, [1, 2, 3, 2, 2])
    world.feed(row, 1)
    limits = TableLimits(rows=7, width=WIDTH + 1, tokens=81)
    builder = DeviceTableBuilder(world.arena, limits, torch.device("cpu"), implementation="torch")
    built = builder.build(world.batch([row]))
    for layer in range(5):
        for table in (built.block_tables, built.seq_lens, built.slot_mapping):
            assert table[layer].data_ptr() % 16 == 0

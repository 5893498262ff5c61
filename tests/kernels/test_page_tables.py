"""Page tables, lengths and slots of a step against loops over layers, rows, entries and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.page_tables import (
    ArenaTables,
    StepTables,
    fill_page_tables,
    page_tables_cost,
)
from tests.kernels.batches import SENTINEL, Row, World, check, oracle, runner_inputs

IMPLEMENTATIONS: list[Implementation] = ["torch", "triton"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compressed_rows_at_page_borders(implementation, device):
    world = World(4, 16, "block", seed=2, slots=7)
    rows = [
        world.admit([1, 2, 3, 2], slack=0, generated=generated, tokens=1, growth=2)
        for generated in (1, 15, 16, 17, 31, 32, 33)
    ]
    check(world, rows, device, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 8192, 8193])
def test_one_plain_row(implementation, length, device):
    """8193 tokens are 513 pages: one more than a program takes at once."""
    world = World(2, 16, "layer", seed=3)
    row = world.plain(length, tokens=min(length, 700))
    check(world, [row], device, implementation, padding=600, width=520)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_compressed_rows_that_several_programs_share(implementation, device):
    world = World(2, 16, "block", seed=4)
    rows = [
        world.admit([600, 513], slack=5, generated=530 * 16, tokens=1, growth=1),
        world.plain(length=1100 * 16, tokens=1),
    ]
    check(world, rows, device, implementation, width=1200)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_arena_that_never_held_a_request(implementation, device):
    world = World(3, 16, "layer", seed=5, slots=0)
    assert world.arena(device).pages.numel() == 0
    check(world, [world.plain(40, 1), world.plain(17, 17)], device, implementation, padding=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_padding_rows_have_no_slot(implementation, device):
    """A row of length 0 that still has a token, as in a batch made up to capture a graph."""
    world = World(2, 16, "block", seed=6)
    compressed = world.admit([2, 1], slack=0, generated=1, tokens=1, growth=0)
    # The last one names a slot, as a buffer that is not cleared between steps may.
    padding = [Row(0, 1, []), Row(0, 1, [], slot=compressed.slot)]
    rows = [world.plain(20, 1), compressed, *padding]
    check(world, rows, device, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_and_a_step_that_covers_part_of_the_tokens(implementation, device):
    world = World(2, 16, "layer", seed=7)
    check(world, [], device, implementation, padding=5)
    rows = [world.plain(20, 9), world.plain(30, 4)]
    check(world, rows, device, implementation, padding=-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flat_ids_and_slots_beyond_32_bits(implementation, device):
    """Page ids near 2^31 make slots that need 64 bits; the arithmetic must not wrap before."""
    far = 2**31 - 100
    arena = ArenaTables(
        torch.full((1, 1, 1), far, dtype=torch.int32, device=device),
        torch.ones(1, 1, dtype=torch.int32, device=device),
        torch.full((1, 1), -4, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.tensor([far], device=device),
        step=1,
        block_size=128,
    )
    out = StepTables.allocate(1, 2, 1, 2, device)
    rows = [Row(length=104, tokens=1, blocks=[], slot=0), Row(length=100, tokens=1, blocks=[50])]
    inputs = runner_inputs(rows, device)
    fill_page_tables(arena, out, **inputs, num_tokens=2, implementation=implementation)
    assert out.block_tables[0, :, 0].tolist() == [far, far + 50]
    assert out.slot_mapping[0].tolist() == [far * 128 + 99, (far + 50) * 128 + 99]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_random_batches(implementation, device, data):
    layers = data.draw(st.integers(1, 4), "layers")
    size = data.draw(st.sampled_from([16, 32, 48]), "block size")
    outermost = data.draw(st.sampled_from(["layer", "block"]), "outermost")
    world = World(layers, size, outermost, data.draw(st.integers(0, 99), "seed"))
    rows: list[Row] = []
    for _ in range(data.draw(st.integers(1, 6), "rows")):
        kind = data.draw(st.sampled_from(["plain", "compressed", "padded"]))
        if kind == "padded":
            rows.append(Row(0, 0, []))
        elif kind == "plain":
            length = data.draw(st.integers(1, 4 * size + 1))
            rows.append(world.plain(length, data.draw(st.integers(1, length))))
        else:
            used = data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))
            slack = data.draw(st.integers(0, size - 1))
            generated = data.draw(st.integers(1, 3 * size))
            tokens = data.draw(st.integers(1, generated))
            growth = data.draw(st.integers(0, 4))
            rows.append(world.admit(used, slack, generated, tokens, growth))
    check(world, rows, device, implementation, data.draw(st.integers(0, 5), "padding"))


@pytest.mark.parametrize("outermost", ["layer", "block"])
def test_strided_views(outermost, device):
    """Buffers and inputs that are parts of larger ones, as a runner's are."""
    world = World(3, 16, outermost, seed=8)
    rows = [
        world.admit([2, 5, 1], slack=2, generated=20, tokens=2, growth=1),
        world.plain(length=70, tokens=5),
    ]
    inputs = runner_inputs(rows, device)
    wide = torch.full((9, 50), 10**7, dtype=torch.int32, device=device)
    wide[3:5, : inputs["block_table"].shape[1]] = inputs["block_table"]
    inputs["block_table"] = wide[3:5]
    for name in ("slots", "seq_lens", "query_start"):
        padded = torch.full((11,), 10**6, dtype=torch.int32, device=device)
        padded[1 : 1 + inputs[name].numel()] = inputs[name]
        inputs[name] = padded[1 : 1 + inputs[name].numel()]
    for implementation in IMPLEMENTATIONS:
        whole = StepTables.allocate(5, 6, 21, 30, device)
        buffers = (whole.block_tables, whole.seq_lens, whole.slot_mapping)
        for buffer in buffers:
            buffer.fill_(SENTINEL)
        tables, lengths, mapping = buffers
        parts = (tables[1:4, 1:5, :19], lengths[1:4, 1:5], mapping[1:4, 5:15])
        view = StepTables(*parts)
        fill_page_tables(
            world.arena(device), view, **inputs, num_tokens=9, implementation=implementation
        )
        for part, expected in zip(parts, oracle(world, rows, view, 9), strict=True):
            np.testing.assert_array_equal(part.cpu().numpy(), expected)
            part.fill_(SENTINEL)
        assert all(bool((buffer == SENTINEL).all()) for buffer in buffers)


def test_a_captured_graph_follows_its_inputs(device):
    """Captured with one batch, replayed with another that was copied into the same inputs."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    world = World(3, 16, "block", seed=11)
    first = [world.plain(40, 1), world.plain(20, 1), Row(0, 0, [])]
    row = world.admit([2, 5, 1], slack=0, generated=17, tokens=1, growth=2)
    second = [world.plain(70, 1), row, world.plain(3, 1)]
    arena, out = world.arena(device), StepTables.allocate(3, 3, 12, 3, device)
    static = {
        name: torch.nn.functional.pad(tensor, (0, 8)) if name == "block_table" else tensor.clone()
        for name, tensor in runner_inputs(first, device).items()
    }
    fill_page_tables(arena, out, **static, num_tokens=3, implementation="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill_page_tables(arena, out, **static, num_tokens=3, implementation="triton")
    for name, tensor in runner_inputs(second, device).items():
        if name == "block_table":
            static[name][:, : tensor.shape[1]] = tensor
        else:
            static[name].copy_(tensor)
    for buffer in (out.block_tables, out.seq_lens, out.slot_mapping):
        buffer.fill_(SENTINEL)
    graph.replay()
    torch.cuda.synchronize()
    buffers = (out.block_tables, out.seq_lens, out.slot_mapping)
    for found, expected in zip(buffers, oracle(world, second, out, 3), strict=True):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


def test_other_sizes_compile_nothing_anew(device, compiled):
    for count in (1, 2, 15, 16, 17):
        world = World(3, 16, "block", seed=13, slots=count)
        rows = [
            world.admit([1 + i % 3, 2, 3], slack=0, generated=1 + 16 * i, tokens=1 + i, growth=i)
            for i in range(count)
        ]
        check(world, rows, device, "triton", padding=count % 3)
    assert len(compiled) <= 1


def good(device) -> tuple[ArenaTables, StepTables, dict[str, Any]]:
    world = World(2, 16, "layer", seed=12)
    return (
        world.arena(device),
        StepTables.allocate(2, 2, 8, 6, device),
        runner_inputs([world.plain(20, 2), world.plain(5, 1)], device),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots must be"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots must be"),
        ({"query_start": torch.zeros(2, dtype=torch.int32)}, "query_start must be"),
        ({"block_table": torch.zeros(2, dtype=torch.int32)}, r"block_table must be \[B, W\]"),
        ({"block_table": torch.zeros(8, 2, dtype=torch.int32).T}, "last dimension of block_table"),
        ({"num_tokens": 7}, "do not fit into buffers"),
        ({"num_tokens": -1}, "do not fit into buffers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message, device):
    arena, out, inputs = good(device)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        fill_page_tables(arena, out, **{**inputs, "num_tokens": 3, **moved})


def test_more_rows_than_the_buffers_hold_are_refused(device):
    arena, _, inputs = good(device)
    small = StepTables.allocate(2, 1, 8, 6, device)
    with pytest.raises(ValueError, match="2 rows and 3 tokens do not fit"):
        fill_page_tables(arena, small, **inputs, num_tokens=3)
    with pytest.raises(ValueError, match="tables of 3 layers"):
        fill_page_tables(arena, StepTables.allocate(3, 2, 8, 6, device), **inputs, num_tokens=3)


def test_arena_and_buffers_of_wrong_shapes_are_refused(device):
    arena, out, _ = good(device)
    parts = vars(arena)
    with pytest.raises(ValueError, match="used must be"):
        ArenaTables(**{**parts, "used": arena.used.long()})
    with pytest.raises(ValueError, match=r"pages must be \[L, slots, A\]"):
        ArenaTables(**{**parts, "pages": arena.pages[0]})
    with pytest.raises(ValueError, match="block size"):
        ArenaTables(**{**parts, "block_size": 0})
    with pytest.raises(ValueError, match="seq_lens must be"):
        StepTables(out.block_tables, out.seq_lens[:1], out.slot_mapping)
    with pytest.raises(ValueError, match=r"slot_mapping \[L, T_max\]"):
        StepTables(out.block_tables, out.seq_lens, out.slot_mapping[0])


def test_cost_counts_every_operand_once():
    # 2 layers x 3 rows x 4 pages, one token a row.
    cost = page_tables_cost(layers=2, entries=24, rows=3, tokens=3)
    assert cost.bytes == 24 * 8 + 3 * 16 + 2 * 3 * 12 + 2 * 3 * 8
    assert cost.flops == 0

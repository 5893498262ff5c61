"""Random batches for the page tables, and what the tables should be, from Python integers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.page_tables import ArenaTables, StepTables, fill_page_tables

NUM_BLOCKS = 4000
SENTINEL = -77


@dataclass
class Row:
    """One row of a batch. ``prompt_pages`` (per layer) and ``shift`` only if it is compressed."""

    length: int
    tokens: int
    blocks: list[int]
    slot: int = -1
    prompt_pages: list[list[int]] = field(default_factory=list)
    shift: list[int] = field(default_factory=list)
    growth: int = 0


class World:
    """Random requests of one pool, with the arena that describes the compressed ones."""

    def __init__(self, layers: int, size: int, outermost: str, seed: int, slots: int = 6) -> None:
        self.rng = np.random.default_rng(seed)
        self.layers, self.size = layers, size
        per_layer = outermost == "layer"
        self.origin = [layer * (NUM_BLOCKS if per_layer else 1) for layer in range(layers)]
        self.step = 1 if per_layer else layers
        self.free = self.rng.permutation(NUM_BLOCKS).tolist()
        self.free_slots = self.rng.permutation(slots).tolist()
        self.slots = slots
        self.compressed: list[Row] = []

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def plain(self, length: int, tokens: int) -> Row:
        return Row(length, tokens, self.take(-(-length // self.size)))

    def admit(self, used: list[int], slack: int, generated: int, tokens: int, growth: int) -> Row:
        """A compressed request whose layers hold ``used`` pages, the last one but for ``slack``.

        ``generated`` tokens came after the prompt; its runner's row has ``growth`` columns of
        other blocks before the growth blocks.
        """
        prompt = max(used) * self.size + int(self.rng.integers(0, 50))
        blocks = self.take(growth + -(-max(generated - slack, 0) // self.size))
        pages = [
            [self.page(int(self.rng.integers(self.layers)), b) for b in self.take(u)] for u in used
        ]
        shift = [u * self.size - slack - prompt for u in used]
        slot = self.free_slots.pop()
        row = Row(prompt + generated, tokens, blocks, slot, pages, shift, growth)
        self.compressed.append(row)
        return row

    def page(self, layer: int, block: int) -> int:
        return self.origin[layer] + block * self.step

    def arena(self, device: torch.device) -> ArenaTables:
        """Unused slots and entries hold numbers that no result may show."""
        held = [len(pages) for row in self.compressed for pages in row.prompt_pages]
        width = max(held) + 2 if held else 0
        pages = np.full((self.layers, self.slots, width), 10**8, dtype=np.int32)
        used = np.full((self.layers, self.slots), 10**6, dtype=np.int32)
        shift = np.full((self.layers, self.slots), -(10**6), dtype=np.int32)
        growth = np.full(self.slots, 10**6, dtype=np.int32)
        for row in self.compressed:
            growth[row.slot] = row.growth
            for layer, ids in enumerate(row.prompt_pages):
                pages[layer, row.slot, : len(ids)] = ids
                used[layer, row.slot] = len(ids)
                shift[layer, row.slot] = row.shift[layer]
        return ArenaTables(
            pages=torch.from_numpy(pages).to(device),
            used=torch.from_numpy(used).to(device),
            shift=torch.from_numpy(shift).to(device),
            growth=torch.from_numpy(growth).to(device),
            origin=torch.tensor(self.origin, dtype=torch.int64, device=device),
            step=self.step,
            block_size=self.size,
        )


def runner_inputs(rows: list[Row], device: torch.device) -> dict[str, Any]:
    """What the runner hands over; entries it does not use hold a block far away."""
    width = max((len(row.blocks) for row in rows), default=0) + 1
    table = np.full((len(rows), width), 10**7, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.blocks)] = row.blocks
    starts = np.cumsum([0, *(row.tokens for row in rows)])
    arrays = {
        "slots": [row.slot for row in rows],
        "seq_lens": [row.length for row in rows],
        "query_start": starts,
    }
    tensors = {k: torch.tensor(np.asarray(v, dtype=np.int32)) for k, v in arrays.items()}
    tensors["block_table"] = torch.from_numpy(table)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def oracle(world: World, rows: list[Row], out: StepTables, num_tokens: int) -> list[np.ndarray]:
    """The buffers after the step, from Python integers alone; what is not due stays a sentinel."""
    shapes = (out.block_tables.shape, out.seq_lens.shape, out.slot_mapping.shape)
    tables, lengths, mapping = (np.full(tuple(s), SENTINEL, dtype=np.int64) for s in shapes)
    mapping[:, :num_tokens] = -1
    for layer in range(world.layers):
        token = 0
        for index, row in enumerate(rows):
            if row.length == 0:
                lengths[layer, index] = 0
                token += row.tokens
                continue
            pages = [world.page(layer, block) for block in row.blocks[row.growth :]]
            held = row.length
            if row.slot >= 0:
                pages = row.prompt_pages[layer] + pages
                held += row.shift[layer]
            lengths[layer, index] = held
            needed = -(-held // world.size)
            assert needed <= len(pages)
            tables[layer, index, :needed] = pages[:needed]
            for position in range(held - row.tokens, held):
                page = pages[position // world.size]
                if token < num_tokens:
                    mapping[layer, token] = page * world.size + position % world.size
                token += 1
    return [tables, lengths, mapping]


def check(
    world: World,
    rows: list[Row],
    device: torch.device,
    implementation: Implementation,
    padding: int = 0,
    width: int = 40,
) -> None:
    tokens = sum(row.tokens for row in rows)
    out = StepTables.allocate(world.layers, len(rows) + 2, width, tokens + padding + 3, device)
    buffers = (out.block_tables, out.seq_lens, out.slot_mapping)
    for buffer in buffers:
        buffer.fill_(SENTINEL)
    arena, inputs = world.arena(device), runner_inputs(rows, device)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    pages_before = arena.pages.clone()
    fill_page_tables(
        arena, out, **inputs, num_tokens=tokens + padding, implementation=implementation
    )
    for found, expected in zip(buffers, oracle(world, rows, out, tokens + padding), strict=True):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor), name
    assert torch.equal(arena.pages, pages_before)

"""A small arena beside plain lists, from which every table of a step can be read off by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_kvcompress.paging.arena import PageArena, PageGeometry, deal_pages
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_tables import (
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
    block table holds, meaningless for compressed rows. ``first``: where in it ``blocks`` begin.
    """

    length: int
    tokens: int
    blocks: list[int]
    name: str | None = None
    prompt: int = 0
    kept: tuple[int, ...] = ()
    pages: tuple[list[int], ...] = ()
    first: int = 0


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
        self.arena.admit(name, blocks, dealt, num_tokens=prompt, slack=slack)
        kept = tuple(c * self.size - slack for c in counts)
        pages = tuple([int(p) for p in part] for part in dealt)
        return Row(prompt, 0, blocks, name, prompt, kept, pages, first=-(-prompt // self.size))

    def cut_again(self, row: Row, counts: list[int] | None = None) -> None:
        """Cut a request back to its arena blocks, in place, or to new ones dealt as told."""
        assert row.name is not None
        dealt = self.arena.dealt_pages(row.name).tolist()
        home, grown = sum(dealt) // self.layers, len(row.blocks)
        if counts is None:
            row.first += grown - home  # the runner's row still begins with all of them
            row.blocks = row.blocks[:home]
            pages = [ids[:count] for ids, count in zip(row.pages, dealt, strict=True)]
        else:
            row.first += grown
            row.blocks = self.take(sum(counts) // self.layers)
            found = deal_pages(self.arena.geometry, row.blocks, np.asarray(counts))
            pages = [ids.tolist() for ids in found]
        self.arena.drop(row.name)
        tables = [np.asarray(ids) for ids in pages]
        column = row.first + len(row.blocks)
        self.arena.admit(row.name, row.blocks, tables, num_tokens=row.length, growth_column=column)
        row.pages, row.prompt = tuple(pages), row.length
        row.kept = tuple(len(ids) * self.size for ids in pages)

    def stage(self, name: str, prompt: int, cached: int, at_once: int) -> Row:
        """A prompt whose layers take turns in a workspace, beyond what the prefix cache had."""
        hits, whole = self.take(cached), -(-prompt // self.size)
        own = whole - cached
        workspace = self.take(-(-at_once * own // self.layers))
        spare = self.geometry.all_pages(workspace).T.reshape(-1).tolist()
        pages = tuple(
            [self.page(layer, block) for block in hits]
            + spare[layer % at_once * own : (layer % at_once + 1) * own]
            for layer in range(self.layers)
        )
        self.arena.stage(name, [np.asarray(ids) for ids in pages])
        tokens, kept = prompt - cached * self.size, (prompt,) * self.layers
        return Row(prompt, tokens, [*hits, *workspace], name, prompt, kept, pages)

    def feed(self, row: Row, tokens: int) -> None:
        """Append tokens to a compressed row, with growth blocks where they are due."""
        row.length += tokens
        row.tokens = tokens
        while (row.kept[0] + row.length - row.prompt) > len(row.pages[0]) * self.size:
            assert row.name is not None
            (block,) = self.take(1)
            row.blocks.append(block)
            self.arena.grow({row.name: [block]})
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
            table[index, row.first : row.first + len(row.blocks)] = row.blocks
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

"""Per-layer page tables, lengths and slot mappings of one step, for all layers at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_kvcompress.paging.arena import IntArray, PageArena
from vllm_kvcompress.paging.rounding import cdiv


@dataclass(frozen=True)
class BatchRows:
    """One batch, as the model runner sees it (logical lengths, block ids).

    Attributes:
        block_table: int32 [B, W], block ids; rows of compressed requests are not read.
        seq_lens: int32 [B], logical lengths after this step.
        query_start: int [B + 1], where each row's tokens begin in the batch.
        slot_mapping: int64 [T], logical slots; negative for padding.
        rows: int64 [C], rows of compressed requests, ascending.
        slots: int64 [C], their slots in the arena.
        seq_lens_bound: int32 [B] on the host, at least ``seq_lens``; None if not known. Needed only
            where ``seq_lens`` is on a device.

    """

    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    slot_mapping: Tensor
    rows: IntArray
    slots: IntArray
    seq_lens_bound: IntArray | None = None


@dataclass(frozen=True)
class LayerTables:
    """What attention needs in place of the runner's tables, per layer.

    Attributes:
        block_tables: int32 [L, B, W], flat page ids.
        seq_lens: int32 [L, B], tokens really held after this step.
        slot_mapping: int64 [L, T], slots in the flat view; negative for padding.
        max_lens: Per layer a number no smaller than its ``seq_lens``; None: look at those.

    """

    block_tables: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    max_lens: list[int] | None = None

    @cached_property
    def by_layer(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer its block table, lengths and slots, all views made at once."""
        parts = (self.block_tables, self.seq_lens, self.slot_mapping)
        return list(zip(*(part.unbind(0) for part in parts), strict=True))


@dataclass(frozen=True)
class TableLimits:
    """The largest batch that tables are ever built for.

    Attributes:
        rows: Requests of a batch, padding included.
        width: Page-table entries of a row.
        tokens: Tokens of a batch, padding included.

    """

    rows: int
    width: int
    tokens: int


class StepTableBuilder(ABC):
    """Builds the tables of each step, for all layers at once.

    Attributes:
        in_place: Whether tables lie in buffers that never move, for a CUDA graph to read.

    """

    in_place: bool = False

    @abstractmethod
    def build(self, batch: BatchRows) -> LayerTables:
        """Return the tables of a batch. No page is touched; earlier tables may be overwritten."""

    def capture(self, seq_lens: Tensor, num_tokens: int) -> LayerTables:
        """Return tables for a batch of dummies that a CUDA graph is captured with."""
        raise NotImplementedError(f"{type(self).__name__} has no buffers that stay in place")

    def warm_up(self) -> None:  # noqa: B027 - on the CPU there is nothing to compile
        """Compile what :meth:`build` needs, so that no request waits for it."""


class TableBuilder(StepTableBuilder):
    """Builds tables on the CPU; keeps the page tables while batch and arena stay the same.

    Args:
        arena: Where the compressed requests' tables are.

    """

    def __init__(self, arena: PageArena) -> None:
        self._arena = arena
        self._key: tuple[int, int, bytes] | None = None
        self._tables: Tensor | None = None

    def build(self, batch: BatchRows) -> LayerTables:
        """See the base class; ``batch`` has a compressed row, its tensors are on the CPU."""
        arena, geometry = self._arena, self._arena.geometry
        seq_lens = batch.seq_lens.numpy().astype(np.int64)
        lens = np.repeat(seq_lens[None], geometry.num_layers, axis=0)
        lens[:, batch.rows] += arena.shift[:, batch.slots]
        return LayerTables(
            block_tables=self._block_tables(batch, seq_lens),
            seq_lens=torch.from_numpy(lens.astype(np.int32)),
            slot_mapping=torch.from_numpy(self._slot_mapping(batch, seq_lens)),
        )

    def _block_tables(self, batch: BatchRows, seq_lens: IntArray) -> Tensor:
        arena, geometry = self._arena, self._arena.geometry
        num_rows = len(seq_lens)
        all_compressed = len(batch.rows) == num_rows
        key = (arena.version, num_rows, batch.slots.tobytes())
        if all_compressed and key == self._key and self._tables is not None:
            return self._tables
        plain = np.ones(num_rows, dtype=np.bool_)
        plain[batch.rows] = False
        compressed_width = int(arena.used[:, batch.slots].max())
        plain_width = 0
        if not all_compressed:
            plain_width = cdiv(int(seq_lens[plain].max()), geometry.block_size)
        width = max(compressed_width, plain_width)
        tables = np.zeros((geometry.num_layers, num_rows, width), dtype=np.int32)
        tables[:, batch.rows, :compressed_width] = arena.tables[:, batch.slots, :compressed_width]
        if plain_width:
            blocks = batch.block_table.numpy()[plain, :plain_width].astype(np.int64)
            pages = geometry.origin[:, None, None] + blocks[None] * geometry.step
            tables[:, plain, :plain_width] = pages
        result = torch.from_numpy(tables)
        self._key, self._tables = (key, result) if all_compressed else (None, None)
        return result

    def _slot_mapping(self, batch: BatchRows, seq_lens: IntArray) -> NDArray[np.int64]:
        arena, geometry = self._arena, self._arena.geometry
        size = geometry.block_size
        logical = batch.slot_mapping.numpy()
        page = geometry.origin[:, None] + (logical // size)[None] * geometry.step
        slots = np.where(logical[None] < 0, logical[None], page * size + (logical % size)[None])
        start = batch.query_start.numpy().astype(np.int64)
        counts = np.diff(start)[batch.rows]
        owner = np.repeat(np.arange(len(batch.rows)), counts)
        first = np.repeat(start[batch.rows] - (np.cumsum(counts) - counts), counts)
        token = first + np.arange(int(counts.sum()))
        # The row's last token sits at its length - 1.
        end = start[batch.rows + 1][owner]
        position = seq_lens[batch.rows][owner] - (end - token)
        slot = batch.slots[owner]
        physical = position[None] + arena.shift[:, slot]
        layers = np.arange(geometry.num_layers)[:, None]
        pages = arena.tables[layers, slot[None], physical // size].astype(np.int64)
        slots[:, token] = pages * size + physical % size
        return np.ascontiguousarray(slots)

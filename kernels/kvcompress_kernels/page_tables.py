"""Page tables, lengths and slot mappings of one step, of every layer, in one launch.

The model runner knows logical lengths and one block table for all layers. A compressed request has
its own pages in every layer, and holds fewer tokens than its logical length. What attention needs
for each layer is written into buffers that keep their addresses, so that CUDA graphs captured over
them stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton


@dataclass(frozen=True)
class ArenaTables:
    """What the compressed requests hold, one slot each; all tensors on one device.

    Entry i of layer l's page table of a compressed request is ``pages[l, slot, i]`` where i <
    used[l, slot], else its page of growth block i - used[l, slot]. The last dimension of ``pages``
    and of the [L, slots] tensors must have stride 1. Whoever admits and removes requests writes
    these tensors; the page table is as up to date as they are.

    Attributes:
        pages: int32 [L, slots, A], flat page ids of the compressed prompt in token order.
        used: int32 [L, slots], how many of those there are.
        shift: int32 [L, slots], physical minus logical length, at most 0.
        growth: int32 [slots], the column of the runner's block-table row where the request's growth
            blocks begin.
        origin: int64 [L]; layer l's page of block b has the flat id origin[l] + b * step.
        step: See ``origin``.
        block_size: Tokens per page.

    Raises:
        ValueError: Shapes, dtypes, devices or strides do not fit together.

    """

    pages: Tensor
    used: Tensor
    shift: Tensor
    growth: Tensor
    origin: Tensor
    step: int
    block_size: int

    def __post_init__(self) -> None:
        """Check shapes, dtypes, devices and strides."""
        if self.pages.ndim != 3:
            raise ValueError(f"pages must be [L, slots, A], got {tuple(self.pages.shape)}")
        layers, slots, _ = self.pages.shape
        if self.block_size < 1:
            raise ValueError(f"the block size must be at least 1, got {self.block_size}")
        device = self.pages.device
        _check("pages", self.pages, tuple(self.pages.shape), torch.int32, device)
        _check("used", self.used, (layers, slots), torch.int32, device)
        _check("shift", self.shift, (layers, slots), torch.int32, device)
        _check("growth", self.growth, (slots,), torch.int32, device)
        _check("origin", self.origin, (layers,), torch.int64, device)


@dataclass(frozen=True)
class StepTables:
    """What attention reads instead of the runner's tables; the buffers live as long as a worker.

    Attributes:
        block_tables: int32 [L, B_max, W_max], flat page ids.
        seq_lens: int32 [L, B_max], tokens held after the step.
        slot_mapping: int64 [L, T_max], page * block size + slot in the page; -1 is no slot.

    Raises:
        ValueError: Shapes, dtypes, devices or strides do not fit together.

    """

    block_tables: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor

    def __post_init__(self) -> None:
        """Check shapes, dtypes, devices and strides."""
        if self.block_tables.ndim != 3 or self.slot_mapping.ndim != 2:
            shapes = tuple(self.block_tables.shape), tuple(self.slot_mapping.shape)
            raise ValueError(
                f"block_tables must be [L, B_max, W_max] and slot_mapping [L, T_max], got {shapes}"
            )
        layers, rows, width = self.block_tables.shape
        device = self.block_tables.device
        _check("block_tables", self.block_tables, (layers, rows, width), torch.int32, device)
        _check("seq_lens", self.seq_lens, (layers, rows), torch.int32, device)
        tokens = self.slot_mapping.shape[1]
        _check("slot_mapping", self.slot_mapping, (layers, tokens), torch.int64, device)

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        max_rows: int,
        max_pages: int,
        max_tokens: int,
        device: torch.device | str,
    ) -> StepTables:
        """Return buffers for the largest step: page id 0, length 0 and slot -1 everywhere.

        Args:
            num_layers: L.
            max_rows: B_max, most requests of a step.
            max_pages: W_max, most pages of a request in a layer.
            max_tokens: T_max, most tokens of a step, with padding.
            device: Where the buffers lie.

        """
        return cls(
            torch.zeros(num_layers, max_rows, max_pages, dtype=torch.int32, device=device),
            torch.zeros(num_layers, max_rows, dtype=torch.int32, device=device),
            torch.full((num_layers, max_tokens), -1, dtype=torch.int64, device=device),
        )


def fill_page_tables(
    arena: ArenaTables,
    out: StepTables,
    *,
    slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_tokens: int,
    implementation: Implementation = "auto",
) -> None:
    """Write one step's page tables, lengths and slots of all layers.

    Row r of layer l has length n = seq_lens[r] + shift[l, slots[r]] (plain rows: seq_lens[r]). The
    first ceil(n / block_size) entries of out.block_tables[l, r] are written, the others stay as
    they are. Token t of row r has logical position seq_lens[r] - (query_start[r + 1] - t); shifted
    like the length, that gives its slot. Tokens of padding rows, and those from query_start[B] to
    ``num_tokens``, get slot -1. Rows from B on and tokens from ``num_tokens`` on stay as they are.

    Mutates ``out`` and nothing else. Does not wait for the device (the torch version does, once).
    Nothing is compiled again when B, W, the number of tokens or the arena's sizes change.

    The caller makes sure that no length exceeds W_max * block_size, that shifted positions of the
    step's tokens are not negative, and that W covers the blocks that are looked up.

    Args:
        arena: What compressed requests hold.
        out: The buffers to fill.
        slots: int32 [B], the arena slot of each row, negative for a request that is not compressed.
        block_table: int32 [B, W], the runner's block ids.
        seq_lens: int32 [B], logical lengths after the step, 0 for a row that only pads the batch.
        query_start: int32 [B + 1], where each row's tokens begin among the step's.
        num_tokens: Tokens of the step, with padding.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Raises:
        ValueError: Shapes, strides, dtypes or devices do not fit together.

    """
    rows = seq_lens.shape[0]
    device = arena.pages.device
    if block_table.ndim != 2:
        raise ValueError(f"block_table must be [B, W], got {tuple(block_table.shape)}")
    _check("slots", slots, (rows,), torch.int32, device)
    _check("block_table", block_table, (rows, block_table.shape[1]), torch.int32, device)
    _check("seq_lens", seq_lens, (rows,), torch.int32, device)
    _check("query_start", query_start, (rows + 1,), torch.int32, device)
    layers, max_rows, _ = out.block_tables.shape
    if layers != arena.pages.shape[0] or out.block_tables.device != device:
        raise ValueError(
            f"tables of {layers} layers on {out.block_tables.device} for an arena of "
            f"{arena.pages.shape[0]} on {device}"
        )
    if rows > max_rows or not 0 <= num_tokens <= out.slot_mapping.shape[1]:
        raise ValueError(
            f"{rows} rows and {num_tokens} tokens do not fit into buffers of {max_rows} rows and "
            f"{out.slot_mapping.shape[1]} tokens"
        )
    if use_triton(out.block_tables, implementation):
        fill = triton_kernels("page_tables").fill_page_tables
    else:
        fill = _fill_page_tables_torch
    fill(arena, out, slots, block_table, seq_lens, query_start, num_tokens)


def page_tables_cost(layers: int, entries: int, rows: int, tokens: int) -> Cost:
    """Return the cost of :func:`fill_page_tables`.

    All index arithmetic is on integers, so there are no floating-point operations.

    Args:
        layers: Number of layers.
        entries: Page-table entries written, over all layers and rows; each is read from the arena
            or from the runner's table.
        rows: Rows of the batch.
        tokens: Tokens of the step, with padding.

    """
    per_row = 4 * (1 + 1 + 1 + 1)  # slot, length, query start, growth column
    per_layer_row = 4 * (1 + 1 + 1)  # used, shift, length
    total = entries * (4 + 4) + rows * (per_row + layers * per_layer_row) + layers * tokens * 8
    return Cost(bytes=total, flops=0)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}, got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} has stride {tensor.stride(-1)}, not 1")


def _fill_page_tables_torch(
    arena: ArenaTables,
    out: StepTables,
    slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_tokens: int,
) -> None:
    rows, device, size = seq_lens.shape[0], seq_lens.device, arena.block_size
    if rows == 0:
        out.slot_mapping[:, :num_tokens] = -1
        return
    lookup = _Lookup(arena, slots, block_table)
    lengths = torch.where(seq_lens > 0, seq_lens + lookup.shift, 0)
    out.seq_lens[:, :rows] = lengths
    needed = (lengths + size - 1) // size
    width = int(needed.max())
    entry = torch.arange(width, device=device).expand(lengths.shape[0], rows, width)
    pages = lookup.pages(torch.arange(rows, device=device)[:, None], entry)
    kept = out.block_tables[:, :rows, :width]
    out.block_tables[:, :rows, :width] = torch.where(entry < needed[..., None], pages.int(), kept)

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    # A token's row is the number of rows that end at it or before it.
    owner = torch.searchsorted(query_start[1:].contiguous(), token, right=True)
    inside = owner < rows
    owner = owner.clamp_max(rows - 1)
    logical = seq_lens[owner] - (query_start[owner + 1] - token)
    position = torch.where(inside & (logical >= 0), logical + lookup.shift[:, owner], -1)
    page = lookup.pages(owner, position.clamp_min(0) // size)
    slot = page * size + position % size
    out.slot_mapping[:, :num_tokens] = torch.where(position >= 0, slot, -1)


class _Lookup:
    """Flat page ids of a batch, by row and entry.

    Attributes:
        shift: int32 [L, B], see :class:`ArenaTables`; 0 in plain rows.

    """

    def __init__(self, arena: ArenaTables, slots: Tensor, block_table: Tensor) -> None:
        layers, held, width = arena.pages.shape
        self._block_table = block_table
        self._origin = arena.origin
        self._step = arena.step
        if held == 0 or width == 0:
            # Nothing was ever admitted, so that every row is plain.
            self.shift = self._used = torch.zeros_like(slots).expand(layers, -1)
            self._growth = torch.zeros_like(slots)
            self._pages = self.shift[..., None]
            return
        compressed = slots >= 0
        slot = slots.clamp_min(0)
        self.shift = torch.where(compressed, arena.shift[:, slot], 0)
        self._used = torch.where(compressed, arena.used[:, slot], 0)
        self._growth = torch.where(compressed, arena.growth[slot], 0)
        self._pages = arena.pages[:, slot]

    def pages(self, row: Tensor, entry: Tensor) -> Tensor:
        """Return the int64 page ids of some entries; entries beyond a row's pages give any id.

        Args:
            row: Row of each entry, broadcast to one layer's entries.
            entry: [L, ...], places in the page table.

        """
        layer = torch.arange(entry.shape[0], device=entry.device)
        layer = layer.view(-1, *(1 for _ in entry.shape[1:]))
        used = self._used[layer, row]
        own = self._pages[layer, row, entry.clamp_max(self._pages.shape[2] - 1)]
        column = self._growth[row] + entry - used
        column = column.clamp(0, self._block_table.shape[1] - 1)
        grown = self._origin[layer] + self._block_table[row, column].long() * self._step
        return torch.where(entry < used, own.long(), grown)

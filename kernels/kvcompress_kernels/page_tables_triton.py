# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernel of the page tables: a program per batch row, layer and share of the row's pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kvcompress_kernels.page_tables import ArenaTables, StepTables

_BLOCK = 512
# Enough programs to fill a large GPU a few times. A row's pages are shared out between several
# programs only while rows and layers alone do not make as many.
_PROGRAMS = 2048


def fill_page_tables(
    arena: ArenaTables,
    out: StepTables,
    slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_tokens: int,
) -> None:
    """Launch the kernel; arguments as in ``page_tables.fill_page_tables``, checked there."""
    rows = seq_lens.shape[0]
    layers, _, width = out.block_tables.shape
    most = max(triton.cdiv(width, _BLOCK), 1)
    parts = min(most, max(_PROGRAMS // ((rows + 1) * layers), 1))
    # One row more than there are: it fills the slots of the padding after the last token.
    _fill[(rows + 1, layers, parts)](
        arena.pages,
        arena.used,
        arena.shift,
        arena.growth,
        arena.origin,
        slots,
        block_table,
        seq_lens,
        query_start,
        out.block_tables,
        out.seq_lens,
        out.slot_mapping,
        rows,
        num_tokens,
        arena.pages.stride(0),
        arena.pages.stride(1),
        arena.used.stride(0),
        arena.shift.stride(0),
        block_table.stride(0),
        out.block_tables.stride(0),
        out.block_tables.stride(1),
        out.seq_lens.stride(0),
        out.slot_mapping.stride(0),
        STEP=arena.step,
        SIZE=arena.block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _pages(row_pages, used, row_blocks, growth, origin, index, mask, STEP: tl.constexpr):
    """int64 [BLOCK] flat page ids of a row's entries ``index``; 0 where ``mask`` is off."""
    own = tl.load(row_pages + index, mask=mask & (index < used), other=0)
    column = growth + index - used
    block = tl.load(row_blocks + column, mask=mask & (index >= used), other=0)
    return tl.where(index < used, own.to(tl.int64), origin + block.to(tl.int64) * STEP)


_POINTERS = [
    *("pages", "used", "shift", "growth", "origin", "slots", "block_table", "seq_lens"),
    *("query_start", "tables", "lengths", "mapping"),
]
_INTEGERS = [
    *("rows", "num_tokens", "pages_layer", "pages_slot", "used_layer", "shift_layer"),
    *("block_row", "tables_layer", "tables_row", "lengths_layer", "mapping_layer"),
]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _fill(
    pages,
    used,
    shift,
    growth,
    origin,
    slots,
    block_table,
    seq_lens,
    query_start,
    tables,
    lengths,
    mapping,
    rows,
    num_tokens,
    pages_layer,
    pages_slot,
    used_layer,
    shift_layer,
    block_row,
    tables_layer,
    tables_row,
    lengths_layer,
    mapping_layer,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * BLOCK
    stride = tl.num_programs(2) * BLOCK
    lane = tl.arange(0, BLOCK)
    mapping_of_layer = mapping + layer * mapping_layer
    if row == rows:
        for start in range(tl.load(query_start + rows) + begin, num_tokens, stride):
            token = start + lane
            nothing = tl.full([BLOCK], -1, tl.int64)
            tl.store(mapping_of_layer + token, nothing, mask=token < num_tokens)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        compressed = slot >= 0
        held = tl.load(used + layer * used_layer + slot, mask=compressed, other=0)
        moved = tl.load(shift + layer * shift_layer + slot, mask=compressed, other=0)
        grown = tl.load(growth + slot, mask=compressed, other=0)
        first_page = tl.load(origin + layer)
        row_pages = pages + layer * pages_layer + slot * pages_slot
        row_blocks = block_table + row * block_row

        logical = tl.load(seq_lens + row)
        length = tl.where(logical > 0, logical + moved, 0)
        if begin == 0:
            tl.store(lengths + layer * lengths_layer + row, length)
        needed = (length + SIZE - 1) // SIZE
        row_table = tables + layer * tables_layer + row * tables_row
        for start in range(begin, needed, stride):
            index = start + lane
            mask = index < needed
            page = _pages(row_pages, held, row_blocks, grown, first_page, index, mask, STEP)
            tl.store(row_table + index, page.to(tl.int32), mask=mask)

        end = tl.load(query_start + row + 1)
        for start in range(tl.load(query_start + row) + begin, end, stride):
            token = start + lane
            before = logical - (end - token)
            position = before + moved
            mask = (token < end) & (before >= 0)
            index = position // SIZE
            page = _pages(row_pages, held, row_blocks, grown, first_page, index, mask, STEP)
            found = tl.where(before >= 0, page * SIZE + position % SIZE, -1)
            inside = (token < end) & (token < num_tokens)
            tl.store(mapping_of_layer + token, found, mask=inside)

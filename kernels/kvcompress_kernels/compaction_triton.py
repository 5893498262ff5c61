# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernels of compaction: rows of integer words, copied tile by tile.

Shapes and strides of the cache are compile-time constants, because they belong to a model and
because the compiler needs them to see how wide an access may be. Everything that changes from call
to call is an ordinary argument on which nothing is specialised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress_kernels.transfer import Sent, upload

# A program moves about this much: large enough that every thread has several 16-byte loads under
# way, small enough that a few thousand survivors give every multiprocessor work.
_TILE_BYTES = 16384


def move_tokens(
    words: Tensor,
    source_pages: Tensor,
    tokens: Tensor,
    counts: Sequence[int] | Sent,
    target_pages: Tensor,
) -> None:
    """Launch :func:`_move_tokens`; arguments as in ``compaction.move_tokens``, in words."""
    _, heads, size, width = words.shape
    assert words.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    assert words.stride(-1) == 1
    rows = _rows_per_program(words)
    grid = (triton.cdiv(tokens.shape[-1], rows), heads, tokens.shape[0])
    _move_tokens[grid](
        words,
        source_pages,
        tokens,
        _on_device(counts, words),
        target_pages,
        *source_pages.stride(),
        *tokens.stride(),
        *target_pages.stride(),
        *words.stride()[:-1],
        SIZE=size,
        WIDTH=width,
        ROWS=rows,
        COLS=triton.next_power_of_2(width),
        num_warps=4,
    )


def pack_tokens(words: Tensor, pages: Tensor, tokens: Tensor, counts: Sequence[int] | Sent) -> None:
    """Launch :func:`_pack_tokens`; arguments as in ``compaction.pack_tokens``, in words."""
    _, heads, size, width = words.shape
    assert words.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    assert words.stride(-1) == 1
    _pack_tokens[(heads, tokens.shape[0])](
        words,
        pages,
        tokens,
        _on_device(counts, words),
        *pages.stride(),
        *tokens.stride(),
        *words.stride()[:-1],
        SIZE=size,
        WIDTH=width,
        ROWS=_rows_per_program(words),
        COLS=triton.next_power_of_2(width),
        num_warps=4,
    )


def copy_pages(words: Tensor, source: Tensor, target: Tensor) -> None:
    """Launch :func:`_copy_pages`; arguments as in ``compaction.copy_pages``, in words."""
    _, heads, size, width = words.shape
    assert words.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    assert words.stride(-1) == 1
    # The dimension with the larger stride outside, so that a program's rows lie close together.
    outer, inner = sorted(((words.stride(1), heads), (words.stride(2), size)), reverse=True)
    rows = _rows_per_program(words)
    grid = (source.numel(), triton.cdiv(heads * size, rows))
    _copy_pages[grid](
        words,
        source,
        target,
        source.stride(0),
        target.stride(0),
        words.stride(0),
        outer[0],
        inner[0],
        INNER=inner[1],
        TOTAL=heads * size,
        WIDTH=width,
        ROWS=rows,
        COLS=triton.next_power_of_2(width),
        num_warps=4,
    )


def _on_device(counts: Sequence[int] | Sent, words: Tensor) -> Tensor:
    if isinstance(counts, Sent):
        return counts.on_device()
    return upload(torch.tensor(counts, dtype=torch.int32), words.device)


def _rows_per_program(words: Tensor) -> int:
    row_bytes = triton.next_power_of_2(words.shape[-1]) * words.element_size()
    return min(max(_TILE_BYTES // row_bytes, 8), 128)


@triton.jit
def _copy_rows(words, source, target, mask, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Copy rows of WIDTH words that begin at the int64 offsets [ROWS] source to target."""
    column = tl.arange(0, COLS)[None, :]
    inside = mask[:, None] & (column < WIDTH)
    values = tl.load(words + source[:, None] + column, mask=inside)
    tl.store(words + target[:, None] + column, values, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("source_job", "source_page", "token_job", "token_head", "token_token"),
        *("target_job", "target_page"),
    ],
    do_not_specialize_on_alignment=["source_pages", "tokens", "counts", "target_pages"],
)
def _move_tokens(
    words,
    source_pages,
    tokens,
    counts,
    target_pages,
    source_job,
    source_page,
    token_job,
    token_head,
    token_token,
    target_job,
    target_page,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS survivors of one head of one job; programs beyond the job's count have nothing to do."""
    head = tl.program_id(1).to(tl.int64)
    job = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + job)
    first = tl.program_id(0) * ROWS
    if first < count:
        slot = first + tl.arange(0, ROWS)
        mask = slot < count
        token = tl.load(
            tokens + job * token_job + head * token_head + slot.to(tl.int64) * token_token,
            mask=mask,
            other=0,
        ).to(tl.int64)
        page = tl.load(
            source_pages + job * source_job + (token // SIZE) * source_page, mask=mask, other=0
        ).to(tl.int64)
        source = page * STRIDE_PAGE + head * STRIDE_HEAD + (token % SIZE) * STRIDE_SLOT
        slot = slot.to(tl.int64)
        page = tl.load(
            target_pages + job * target_job + (slot // SIZE) * target_page, mask=mask, other=0
        ).to(tl.int64)
        target = page * STRIDE_PAGE + head * STRIDE_HEAD + (slot % SIZE) * STRIDE_SLOT
        _copy_rows(words, source, target, mask, WIDTH, COLS)


@triton.jit(
    do_not_specialize=["job_step", "page_step", "token_job", "token_head", "token_token"],
    do_not_specialize_on_alignment=["pages", "tokens", "counts"],
)
def _pack_tokens(
    words,
    pages,
    tokens,
    counts,
    job_step,
    page_step,
    token_job,
    token_head,
    token_token,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """All survivors of one head of one job, ROWS at a time.

    Survivor i lies at i or behind it, so a tile's targets lie before the sources of all later
    tiles. Within a tile all rows are read before the first is written.
    """
    head = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + job)
    own = pages + job * job_step
    column = tl.arange(0, COLS)[None, :]
    for first in tl.range(0, count, ROWS, num_stages=1):
        slot = (first + tl.arange(0, ROWS)).to(tl.int64)
        token = tl.load(
            tokens + job * token_job + head * token_head + slot * token_token,
            mask=slot < count,
            other=0,
        ).to(tl.int64)
        moves = (slot < count) & (token != slot)
        page = tl.load(own + (token // SIZE) * page_step, mask=moves, other=0).to(tl.int64)
        source = page * STRIDE_PAGE + head * STRIDE_HEAD + (token % SIZE) * STRIDE_SLOT
        page = tl.load(own + (slot // SIZE) * page_step, mask=moves, other=0).to(tl.int64)
        target = page * STRIDE_PAGE + head * STRIDE_HEAD + (slot % SIZE) * STRIDE_SLOT
        inside = moves[:, None] & (column < WIDTH)
        values = tl.load(words + source[:, None] + column, mask=inside)
        tl.debug_barrier()
        tl.store(words + target[:, None] + column, values, mask=inside)


@triton.jit(
    do_not_specialize=["source_step", "target_step"],
    do_not_specialize_on_alignment=["source", "target"],
)
def _copy_pages(
    words,
    source,
    target,
    source_step,
    target_step,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_OUTER: tl.constexpr,
    STRIDE_INNER: tl.constexpr,
    INNER: tl.constexpr,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS of the TOTAL rows of one page; a page is outer x inner rows of WIDTH words."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offset = (row // INNER).to(tl.int64) * STRIDE_OUTER + (row % INNER) * STRIDE_INNER
    from_page = tl.load(source + index * source_step).to(tl.int64)
    to_page = tl.load(target + index * target_step).to(tl.int64)
    _copy_rows(
        words,
        from_page * STRIDE_PAGE + offset,
        to_page * STRIDE_PAGE + offset,
        row < TOTAL,
        WIDTH,
        COLS,
    )

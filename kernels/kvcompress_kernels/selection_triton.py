# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernel of ``selection``: radix select per head.

Scores are ranked by an int32 image of fp32 that keeps their order and that is equal for equal
scores. The k-th largest image is found from the top, digit by digit: 8 bits, 12 bits, 12 bits. The
first digit sees every score and most scores fall into a few of its bins, so it is counted inside
the program (``tl.histogram``). The others see only the scores that share the digits before, spread
over 4096 bins, and are counted by integer atomics in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress_kernels.token_scores_triton import token_scores
from kvcompress_kernels.transfer import Parcel

__all__ = ["select_tokens", "token_scores"]

_TOP_BINS = tl.constexpr(256)
_BINS = tl.constexpr(4096)
SCRATCH = 4096  # histogram entries per row of the two lower digits


@triton.jit
def ordered(scores):
    """Int32 images of fp32: the same order, -0.0 equal to 0.0, every NaN equal and on top."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    images = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, images)


@triton.jit
def bin_of_kth(counts, bins, wanted):
    """(bin that holds the wanted-th largest entry, entries in the bins above it)."""
    from_top = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    found = tl.sum((from_top >= wanted).to(tl.int32), axis=0) - 1
    return found, tl.sum(tl.where(bins > found, counts, 0), axis=0)


@triton.jit
def kth_largest(source, length, count, counted, BLOCK: tl.constexpr):
    """Image of a row's count-th largest score, and how many of its equals are among the count.

    Args:
        source: The row's fp32 scores.
        length: Their number; 0: nothing is read.
        count: 1 to length, else the result is void.
        counted: int32 [4096], this program's own; what it holds does not matter.
        BLOCK: Scores at a time.

    """
    lanes = tl.arange(0, BLOCK)
    top_bins = tl.arange(0, _TOP_BINS)
    histogram = tl.zeros([_TOP_BINS], dtype=tl.int32)
    for start in range(0, length, BLOCK):
        at = start + lanes
        inside = at < length
        images = ordered(tl.load(source + at, mask=inside, other=0.0))
        histogram += tl.histogram((images >> 24) + 128, _TOP_BINS, mask=inside)
    digit, above = bin_of_kth(histogram, top_bins, count)
    prefix = digit - 128
    wanted = count - above

    bins = tl.arange(0, _BINS)
    for step in tl.static_range(2):
        shift = 12 - 12 * step
        # Barriers: all threads' zeros, then counts, then reads, one after the other.
        tl.store(counted + bins, tl.zeros([_BINS], dtype=tl.int32))
        tl.debug_barrier()
        for start in range(0, length, BLOCK):
            at = start + lanes
            images = ordered(tl.load(source + at, mask=at < length, other=0.0))
            candidate = (at < length) & ((images >> (shift + 12)) == prefix)
            tl.atomic_add(counted + ((images >> shift) & 0xFFF), 1, mask=candidate, sem="relaxed")
        tl.debug_barrier()
        # ".cg" reads where atomics write.
        digit, above = bin_of_kth(tl.load(counted + bins, cache_modifier=".cg"), bins, wanted)
        tl.debug_barrier()
        prefix = (prefix << 12) | digit
        wanted -= above
    return prefix, wanted


@triton.jit(
    do_not_specialize=["jobs", "heads", "width"],
    do_not_specialize_on_alignment=["table", "kept", "scratch"],
)
def _select_kernel(
    table,  # int64 [5, jobs]: address, stride of a head, tokens, tokens to choose, tail
    kept,  # int32 [jobs, heads, width]
    scratch,  # int32 [jobs * heads, 4096]
    jobs,
    heads,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    job = row // heads
    entry = table + job
    scores = tl.load(entry).to(tl.pointer_type(tl.float32))
    source = scores + (row % heads) * tl.load(entry + jobs)
    tokens = tl.load(entry + 2 * jobs).to(tl.int32)
    count = tl.load(entry + 3 * jobs).to(tl.int32)
    tail = tl.load(entry + 4 * jobs).to(tl.int32)
    target = kept + row.to(tl.int64) * width
    # Nothing to keep, nothing to read: the loops below are skipped.
    length = tl.where(count > 0, tokens, 0)
    lanes = tl.arange(0, BLOCK)
    counted = scratch + row.to(tl.int64) * _BINS
    prefix, wanted = kth_largest(source, length, count, counted, BLOCK)

    # ``prefix`` is now the image of the count-th largest score, ``wanted`` how many of its ties
    # are kept: those of the lowest ids.
    seen_above = 0
    seen_tied = 0
    for start in range(0, length, BLOCK):
        at = start + lanes
        inside = at < length
        images = ordered(tl.load(source + at, mask=inside, other=0.0))
        is_above = (inside & (images > prefix)).to(tl.int32)
        is_tied = (inside & (images == prefix)).to(tl.int32)
        # Both running counts in one scan: a tile has at most 4096 of either.
        both = is_above | (is_tied << 16)
        through = tl.cumsum(both, axis=0)
        tied_before = seen_tied + (through >> 16) - is_tied
        slot = seen_above + (through & 0xFFFF) - is_above + tl.minimum(tied_before, wanted)
        take = (is_above == 1) | ((is_tied == 1) & (tied_before < wanted))
        tl.store(target + slot, at, mask=take)
        total = tl.sum(both, axis=0)
        seen_above += total & 0xFFFF
        seen_tied += total >> 16
    for start in range(count, width, BLOCK):
        at = start + lanes
        recent = tl.where(at < count + tail, tokens + at - count, -1)
        tl.store(target + at, recent, mask=at < width)


def select_tokens(
    scores: Sequence[Tensor],
    counts: Sequence[int],
    tails: Sequence[int],
    kept: Tensor,
    parcel: Parcel | None,
) -> None:
    """Launch the kernel; the caller has checked that no dimension is empty.

    Jobs may lie anywhere: the kernel is given their addresses.

    Args:
        scores: Per job fp32 [N, S_r], last dimension contiguous, S_r < 2 ** 31.
        counts: 0 <= counts[r] <= S_r.
        tails: Tokens that follow the chosen ones.
        kept: int32 [R, N, T], contiguous, T at least every count and tail; is filled.
        parcel: What the kernel is given is sent with what waits in it.

    """
    jobs, heads, width = kept.shape
    assert kept.dtype == torch.int32
    assert kept.is_contiguous()
    for job in scores:
        assert job.dtype == torch.float32
        assert job.device == kept.device
        assert job.stride(1) == 1 or job.shape[1] == 1
    rows = jobs * heads
    described = [
        (job.data_ptr(), job.stride(0), job.shape[1], count, tail)
        for job, count, tail in zip(scores, counts, tails, strict=True)
    ]
    parcel = Parcel(kept.device) if parcel is None else parcel
    table = parcel.add(np.asarray(described, dtype=np.int64).T)
    scratch = torch.empty(rows * SCRATCH, dtype=torch.int32, device=kept.device)
    block, warps = tile_of(max(job.shape[1] for job in scores))
    _select_kernel[(rows,)](
        table.on_device(),
        kept,
        scratch,
        jobs,
        heads,
        width,
        BLOCK=block,
        num_warps=warps,
    )


def tile_of(tokens: int) -> tuple[int, int]:
    """(columns of a tile, warps): two variants, so that lengths do not cause compilations."""
    return (1024, 4) if tokens <= 1024 else (4096, 16)

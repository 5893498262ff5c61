# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernels of ``selection``: radix select per head and DynamicKV's counts per layer.

Scores are ranked by an int32 image of fp32 that keeps their order and that is equal for equal
scores. The k-th largest image is found from the top, digit by digit: 8 bits, 12 bits, 12 bits. The
first digit sees every score and most scores fall into a few of its bins, so it is counted inside
the program (``tl.histogram``). The others see only the scores that share the digits before, spread
over 4096 bins, and are counted by integer atomics in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress_kernels.token_scores_triton import token_scores
from kvcompress_kernels.transfer import upload

__all__ = ["select_tokens", "token_scores", "winners_per_layer"]

_TOP_BINS = tl.constexpr(256)
_BINS = tl.constexpr(4096)
_SCRATCH = 2 * 4096  # histogram entries per row of the two lower digits
_SPAN = 4  # tiles one program of the layer histogram walks
_LIMIT = 1 << 31  # entries that int32 counters can count


@triton.jit
def _ordered(scores):
    """Int32 images of fp32: the same order, -0.0 equal to 0.0, every NaN equal and on top."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    images = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, images)


@triton.jit
def _bin_of_kth(counts, bins, wanted):
    """(bin that holds the wanted-th largest entry, entries in the bins above it)."""
    from_top = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    found = tl.sum((from_top >= wanted).to(tl.int32), axis=0) - 1
    return found, tl.sum(tl.where(bins > found, counts, 0), axis=0)


@triton.jit(
    do_not_specialize=["tokens", "heads", "job_stride", "head_stride", "max_count"],
    do_not_specialize_on_alignment=["scores", "kept", "scratch", "counts"],
)
def _select_kernel(
    scores,  # fp32, row (job, head) at job * job_stride + head * head_stride
    kept,  # int32 [jobs, heads, max_count]
    scratch,  # int32 [jobs * heads, 2, 4096], all zero
    counts,  # int32 [jobs]
    tokens,
    heads,
    job_stride,
    head_stride,
    max_count,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    job = row // heads
    source = scores + job.to(tl.int64) * job_stride + (row % heads).to(tl.int64) * head_stride
    target = kept + row.to(tl.int64) * max_count
    count = tl.load(counts + job)
    # Nothing to keep, nothing to read: the loops below are skipped.
    length = tl.where(count > 0, tokens, 0)
    lanes = tl.arange(0, BLOCK)

    top_bins = tl.arange(0, _TOP_BINS)
    histogram = tl.zeros([_TOP_BINS], dtype=tl.int32)
    for start in range(0, length, BLOCK):
        at = start + lanes
        inside = at < length
        images = _ordered(tl.load(source + at, mask=inside, other=0.0))
        histogram += tl.histogram((images >> 24) + 128, _TOP_BINS, mask=inside)
    digit, above = _bin_of_kth(histogram, top_bins, count)
    prefix = digit - 128
    wanted = count - above

    bins = tl.arange(0, _BINS)
    for step in tl.static_range(2):
        shift = 12 - 12 * step
        counted = scratch + (row.to(tl.int64) * 2 + step) * _BINS
        for start in range(0, length, BLOCK):
            at = start + lanes
            images = _ordered(tl.load(source + at, mask=at < length, other=0.0))
            candidate = (at < length) & ((images >> (shift + 12)) == prefix)
            tl.atomic_add(counted + ((images >> shift) & 0xFFF), 1, mask=candidate, sem="relaxed")
        # The counts of this program's other threads are read next; ".cg" reads where atomics write.
        tl.debug_barrier()
        digit, above = _bin_of_kth(tl.load(counted + bins, cache_modifier=".cg"), bins, wanted)
        prefix = (prefix << 12) | digit
        wanted -= above

    # ``prefix`` is now the image of the count-th largest score, ``wanted`` how many of its ties
    # are kept: those of the lowest ids.
    seen_above = 0
    seen_tied = 0
    for start in range(0, length, BLOCK):
        at = start + lanes
        inside = at < length
        images = _ordered(tl.load(source + at, mask=inside, other=0.0))
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
    for start in range(count, max_count, BLOCK):
        at = start + lanes
        tl.store(target + at, -1, mask=at < max_count)


def select_tokens(scores: Tensor, counts: Sequence[int], kept: Tensor) -> None:
    """Launch the kernel; the caller has checked that no dimension is empty.

    Args:
        scores: fp32 [R, N, S], last dimension contiguous, S < 2 ** 31.
        counts: 0 <= counts[r] <= S.
        kept: int32 [R, N, max(counts)], contiguous; is filled.

    """
    jobs, heads, tokens = scores.shape
    assert scores.dtype == torch.float32
    assert scores.stride(2) == 1 or tokens == 1
    assert kept.dtype == torch.int32
    assert kept.is_contiguous()
    rows = jobs * heads
    scratch = torch.zeros(rows * _SCRATCH, dtype=torch.int32, device=scores.device)
    block, warps = _tile(tokens)
    _select_kernel[(rows,)](
        scores,
        kept,
        scratch,
        upload(torch.tensor(counts, dtype=torch.int32), scores.device),
        tokens,
        heads,
        scores.stride(0),
        scores.stride(1),
        kept.shape[2],
        BLOCK=block,
        num_warps=warps,
    )


def _tile(tokens: int) -> tuple[int, int]:
    """(columns of a tile, warps): two variants, so that lengths do not cause compilations."""
    return (1024, 4) if tokens <= 1024 else (4096, 16)


@triton.jit(
    do_not_specialize=["layers"],
    do_not_specialize_on_alignment=["table", "state", "histogram"],
)
def _layer_histogram_kernel(
    table,  # int64 [4, layers]: address, stride of a head, heads, tokens
    state,  # int32 [3, 2]: (digits found so far, how many entries are still wanted) per digit
    histogram,  # int32 [layers, BINS], all zero
    layers,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    layer = tl.program_id(2)
    entry = table + layer
    stride = tl.load(entry + layers)
    tokens = tl.load(entry + 3 * layers).to(tl.int32)
    tokens = tl.where(head < tl.load(entry + 2 * layers), tokens, 0)
    source = tl.load(entry).to(tl.pointer_type(tl.float32)) + head * stride
    counted = histogram + layer * BINS
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0) * (SPAN * BLOCK)
    last = tl.minimum(tokens, first + SPAN * BLOCK)
    if STEP == 0:
        bins = tl.arange(0, BINS)
        own = tl.zeros([BINS], dtype=tl.int32)
        for start in range(first, last, BLOCK):
            at = start + lanes
            images = _ordered(tl.load(source + at, mask=at < last, other=0.0))
            own += tl.histogram((images >> 24) + 128, BINS, mask=at < last)
        tl.atomic_add(counted + bins, own, mask=own > 0, sem="relaxed")
    else:
        shift: tl.constexpr = 24 - 12 * STEP
        prefix = tl.load(state + 2 * STEP - 2)
        for start in range(first, last, BLOCK):
            at = start + lanes
            images = _ordered(tl.load(source + at, mask=at < last, other=0.0))
            candidate = (at < last) & ((images >> (shift + 12)) == prefix)
            tl.atomic_add(counted + ((images >> shift) & 0xFFF), 1, mask=candidate, sem="relaxed")


@triton.jit(
    do_not_specialize=["layers", "k"],
    do_not_specialize_on_alignment=["histogram", "state", "winners"],
)
def _layer_threshold_kernel(
    histogram,  # int32 [layers, BINS]
    state,  # int32 [3, 2], row STEP is written
    winners,  # int64 [layers], grows with every digit
    layers,
    k,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """One program a layer; each sums all layers' counts itself, which spares a launch."""
    layer = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for other in range(layers):
        total += tl.load(histogram + other * BINS + bins)
    if STEP == 0:
        prefix = 0
        wanted = k
    else:
        prefix = tl.load(state + 2 * STEP - 2)
        wanted = tl.load(state + 2 * STEP - 1)
    digit, above = _bin_of_kth(total, bins, wanted)
    wanted -= above
    own = tl.load(histogram + layer * BINS + bins)
    won = tl.sum(tl.where(bins > digit, own, 0), axis=0)
    if STEP == 2:
        # What is left in the bin are exact ties; layers take them in order.
        tied = tl.sum(tl.where(bins == digit, own, 0), axis=0)
        others = tl.arange(0, LAYERS)
        before = tl.load(histogram + others * BINS + digit, mask=others < layer, other=0)
        left = tl.maximum(wanted - tl.sum(before, axis=0), 0)
        won += tl.minimum(left, tied)
    tl.store(winners + layer, tl.load(winners + layer) + won)
    if layer == 0:
        tl.store(state + 2 * STEP, digit - 128 if STEP == 0 else (prefix << 12) | digit)
        tl.store(state + 2 * STEP + 1, wanted)


def winners_per_layer(scores: Sequence[Tensor], k: int) -> Tensor:
    """Launch the kernels: six launches for any number of layers, no wait for the device.

    Layers may lie anywhere: the kernel is given their addresses. A layer that is not fp32 with
    contiguous rows is copied first.

    Args:
        scores: As in ``selection.winners_per_layer``.
        k: 0 < k < number of entries < 2 ** 31.

    Returns:
        int64 [layers] on the scores' device.

    """
    rows = [layer if layer.dim() == 2 else layer.reshape(1, -1) for layer in scores]
    rows = [
        layer
        if layer.dtype == torch.float32 and layer.stride(1) == 1
        else layer.detach().float().contiguous()
        for layer in rows
    ]
    assert sum(layer.numel() for layer in rows) < _LIMIT
    assert all(layer.device == rows[0].device for layer in rows)
    layers = len(rows)
    device = rows[0].device
    described = [(layer.data_ptr(), layer.stride(0), *layer.shape) for layer in rows]
    table = upload(torch.tensor(described, dtype=torch.int64).T.contiguous(), device)
    longest = max(layer.shape[1] for layer in rows)
    most_heads = max(layer.shape[0] for layer in rows)
    block, warps = _tile(longest)
    grid = (triton.cdiv(longest, _SPAN * block), most_heads, layers)
    sizes = [256, 4096, 4096]
    histograms = torch.zeros(layers * sum(sizes), dtype=torch.int32, device=device)
    state = torch.empty(6, dtype=torch.int32, device=device)
    winners = torch.zeros(layers, dtype=torch.int64, device=device)
    parts = torch.split(histograms, [layers * size for size in sizes])
    for step, (size, histogram) in enumerate(zip(sizes, parts, strict=True)):
        _layer_histogram_kernel[grid](
            table,
            state,
            histogram,
            layers,
            STEP=step,
            BINS=size,
            SPAN=_SPAN,
            BLOCK=block,
            num_warps=warps,
        )
        _layer_threshold_kernel[(layers,)](
            histogram,
            state,
            winners,
            layers,
            k,
            STEP=step,
            BINS=size,
            LAYERS=max(128, triton.next_power_of_2(layers)),  # one variant for all stages
            num_warps=16 if size > 256 else 4,
        )
    return winners

# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernels of ``winners``: whose entries are the best ones, at several stages at once.

The k-th largest entry of each stage is found digit by digit as in ``selection_triton``. The first
digit's counts are those of layers and serve all stages; the others are those of *pairs*, of a stage
and one of its layers, because stages differ in the digits found before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress_kernels.selection_triton import (
    SCRATCH,
    bin_of_kth,
    kth_largest,
    ordered,
    tile_of,
)
from kvcompress_kernels.transfer import Parcel

_SPAN = 4  # tiles one program of the layer histogram walks
_LIMIT = 1 << 31  # entries that int32 counters can count
_SIZES = (256, 4096, 4096)  # bins of the three digits
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit(
    do_not_specialize=["layers", "heads", "least"],
    do_not_specialize_on_alignment=["table", "ground", "scratch"],
)
def _background_kernel(
    table,  # int64 [7, layers]: address, stride of a head, heads, tokens, stages, rank
    ground,  # fp32 [layers, heads, 2], is filled: background and unit
    scratch,  # int32 [layers * heads, 4096]
    layers,
    heads,
    least,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    entry = table + row // heads
    head = row % heads
    if head < tl.load(entry + 2 * layers):
        source = tl.load(entry).to(tl.pointer_type(tl.float32)) + head * tl.load(entry + layers)
        tokens = tl.load(entry + 3 * layers).to(tl.int32)
        count = tl.load(entry + 6 * layers).to(tl.int32)
        counted = scratch + row.to(tl.int64) * 4096
        image, _ = kth_largest(source, tokens, count, counted, BLOCK)
        bits = tl.where(image < 0, -image | -2147483648, image)
        background = bits.to(tl.float32, bitcast=True)
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, tokens, BLOCK):
            at = start + lanes
            sums += tl.abs(tl.load(source + at, mask=at < tokens, other=0.0))
        floor = least * (tl.sum(sums, axis=0) / tokens)
        unit = tl.maximum(tl.abs(background), floor, propagate_nan=tl.PropagateNan.ALL)
        unit = tl.maximum(unit, _TINY, propagate_nan=tl.PropagateNan.ALL)
        tl.store(ground + 2 * row, background)
        tl.store(ground + 2 * row + 1, unit)


@triton.jit(
    do_not_specialize=["layers", "heads", "stages"],
    do_not_specialize_on_alignment=["table", "ground", "about", "state", "histogram"],
)
def _layer_histogram_kernel(
    table,  # int64 [7, layers]: address, stride of a head, heads, tokens, first and last stage
    ground,  # fp32 [layers, heads, 2]: background and unit; not read unless HAS_GROUND
    about,  # int32 [4, stages]: first layer, layer behind the last, first pair, winners
    state,  # int32 [stages, 3, 2]: (digits found so far, how many entries are still wanted)
    histogram,  # int32 [layers or pairs, BINS], all zero
    layers,
    heads,
    stages,
    HAS_GROUND: tl.constexpr,
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
    background = 0.0
    unit = 1.0
    if HAS_GROUND:
        background = tl.load(ground + 2 * (layer * heads + head))
        unit = tl.load(ground + 2 * (layer * heads + head) + 1)
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0) * (SPAN * BLOCK)
    last = tl.minimum(tokens, first + SPAN * BLOCK)
    bins = tl.arange(0, BINS)
    own = tl.zeros([BINS], dtype=tl.int32)
    first_stage = tl.load(entry + 4 * layers).to(tl.int32)
    last_stage = tl.load(entry + 5 * layers).to(tl.int32)
    for start in range(first, last, BLOCK):
        at = start + lanes
        inside = at < last
        values = tl.load(source + at, mask=inside, other=0.0)
        if HAS_GROUND:
            values = tl.div_rn(values - background, tl.zeros([BLOCK], tl.float32) + unit)
        images = ordered(values)
        if STEP == 0:
            own += tl.histogram((images >> 24) + 128, BINS, mask=inside)
        else:
            shift: tl.constexpr = 24 - 12 * STEP
            for stage in range(first_stage, last_stage + 1):
                begin = tl.load(about + stage)
                stop = tl.where(layer < tl.load(about + stages + stage), last, 0)
                stop = tl.where(layer < begin, 0, stop)
                pair = tl.load(about + 2 * stages + stage) + layer - begin
                prefix = tl.load(state + stage * 6 + 2 * STEP - 2)
                candidate = (at < stop) & ((images >> (shift + 12)) == prefix)
                counted = histogram + pair.to(tl.int64) * BINS
                digits = (images >> shift) & 0xFFF
                tl.atomic_add(counted + digits, 1, mask=candidate, sem="relaxed")
    if STEP == 0:
        tl.atomic_add(histogram + layer * BINS + bins, own, mask=own > 0, sem="relaxed")


@triton.jit(
    do_not_specialize=["stages"],
    do_not_specialize_on_alignment=["histogram", "about", "stage_of", "state", "winners"],
)
def _layer_threshold_kernel(
    histogram,  # int32 [layers or pairs, BINS]
    about,  # int32 [4, stages], as above
    stage_of,  # int32 [pairs]
    state,  # int32 [stages, 3, 2], row STEP of each stage is written
    winners,  # int64 [pairs], grows with every digit
    stages,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program a pair; each sums its stage's counts itself, which spares a launch."""
    pair = tl.program_id(0)
    stage = tl.load(stage_of + pair)
    begin = tl.load(about + stage)
    seen = tl.load(about + stages + stage) - begin
    first_pair = tl.load(about + 2 * stages + stage)
    place = pair - first_pair
    rows = histogram + (begin if STEP == 0 else first_pair).to(tl.int64) * BINS
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for other in range(seen):
        total += tl.load(rows + other * BINS + bins)
    found = state + stage * 6
    if STEP == 0:
        prefix = 0
        wanted = tl.load(about + 3 * stages + stage)
    else:
        prefix = tl.load(found + 2 * STEP - 2)
        wanted = tl.load(found + 2 * STEP - 1)
    digit, above = bin_of_kth(total, bins, wanted)
    wanted -= above
    own = tl.load(rows + place * BINS + bins)
    won = tl.sum(tl.where(bins > digit, own, 0), axis=0)
    if STEP == 2:
        # What is left in the bin are exact ties; layers take them in order.
        before = 0
        for other in range(place):
            before += tl.load(rows + other * BINS + digit)
        tied = tl.sum(tl.where(bins == digit, own, 0), axis=0)
        won += tl.minimum(tl.maximum(wanted - before, 0), tied)
    if STEP == 0:
        tl.store(winners + pair, won.to(tl.int64))
    else:
        tl.store(winners + pair, tl.load(winners + pair) + won)
    if place == 0:
        tl.store(found + 2 * STEP, digit - 128 if STEP == 0 else (prefix << 12) | digit)
        tl.store(found + 2 * STEP + 1, wanted)


def winners_by_stage(
    scores: Sequence[Tensor],
    stages: Sequence[tuple[int, int, int]],
    background: float | None,
    least: float,
) -> Tensor:
    """Launch the kernels: six for any number of layers and stages, one more for the background.

    Layers may lie anywhere: the kernels are given their addresses. A layer that is not fp32 with
    contiguous rows is copied first. Nothing waits for the device.

    Args:
        scores: As in ``winners.winners_by_stage``.
        stages: First layer, layer behind the last, and k: 0 < k < number of entries < 2 ** 31.
        background: As there.
        least: As there.

    Returns:
        int64 on the scores' device: the winners of the stages' layers, one stage after the other.

    """
    rows = [layer if layer.dim() == 2 else layer.reshape(1, -1) for layer in scores]
    rows = [
        layer
        if layer.dtype == torch.float32 and layer.stride(1) == 1
        else layer.detach().float().contiguous()
        for layer in rows
    ]
    for first, stop, _ in stages:
        assert sum(layer.numel() for layer in rows[first:stop]) < _LIMIT
    assert all(layer.device == rows[0].device for layer in rows)
    layers, device = len(rows), rows[0].device
    table, about, stage_of = _describe(rows, stages, background)
    parcel = Parcel(device)
    sent = [parcel.add(table), parcel.add(about), parcel.add(stage_of)]
    on_device, about_them, stage_of_pair = (each.on_device() for each in sent)
    longest = max(layer.shape[1] for layer in rows)
    heads = max(layer.shape[0] for layer in rows)
    block, warps = tile_of(longest)
    pairs = len(stage_of)

    def new(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    state, winners = new(6 * len(stages)), new(pairs, torch.int64)
    ground = new(2 * layers * heads if background is not None else 0, torch.float32)
    if background is not None:
        scratch = new(layers * heads * SCRATCH)
        _background_kernel[(layers * heads,)](
            on_device, ground, scratch, layers, heads, least, BLOCK=block, num_warps=warps
        )
    grid = (triton.cdiv(longest, _SPAN * block), heads, layers)
    counters = [layers * _SIZES[0], pairs * _SIZES[1], pairs * _SIZES[2]]
    histograms = torch.zeros(sum(counters), dtype=torch.int32, device=device)
    parts = torch.split(histograms, counters)
    for step, (size, histogram) in enumerate(zip(_SIZES, parts, strict=True)):
        _layer_histogram_kernel[grid](
            on_device,
            ground,
            about_them,
            state,
            histogram,
            layers,
            heads,
            len(stages),
            HAS_GROUND=background is not None,
            STEP=step,
            BINS=size,
            SPAN=_SPAN,
            BLOCK=block,
            num_warps=warps,
        )
        _layer_threshold_kernel[(pairs,)](
            histogram,
            about_them,
            stage_of_pair,
            state,
            winners,
            len(stages),
            STEP=step,
            BINS=size,
            num_warps=16 if size > 256 else 4,
        )
    return winners


def _describe(
    rows: Sequence[Tensor], stages: Sequence[tuple[int, int, int]], background: float | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The layers' table, the stages and the pairs' stages, as the kernels read them."""
    first_stage = np.full(len(rows), len(stages), dtype=np.int64)
    last_stage = np.full(len(rows), -1, dtype=np.int64)
    for number, (first, stop, _) in enumerate(stages):
        first_stage[first:stop] = np.minimum(first_stage[first:stop], number)
        last_stage[first:stop] = number
    table = np.empty((7, len(rows)), dtype=np.int64)
    table[:4] = np.array([(row.data_ptr(), row.stride(0), *row.shape) for row in rows]).T
    table[4], table[5] = first_stage, last_stage
    # From the top, as the kernels count.
    table[6] = table[3] - np.ceil(table[3] * (background or 0.0)).astype(np.int64) + 1
    sizes = np.array([stop - first for first, stop, _ in stages])
    about = np.empty((4, len(stages)), dtype=np.int32)
    about[[0, 1, 3]] = np.array(stages).T
    about[2] = np.cumsum(sizes) - sizes
    return table, about, np.repeat(np.arange(len(stages), dtype=np.int32), sizes)

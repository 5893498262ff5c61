# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernels of the window statistics: two passes over the keys, a small step
between them and one behind them.

1. ``row_sums``: every program takes one KV head's share of the tokens and finds, for each query
   row, the largest logit, the sum of exponentials relative to it (online softmax, no values) and
   what the entropy needs. Entropy is a sum over rows as well as over columns; taken here it
   leaves both passes about the same arithmetic.
2. ``combine``: joins the shares of a row, adds the sink.
3. ``columns``: reads the keys once more. The probabilities are now known, and a tile holds all
   queries of a head for its tokens, so mean and variance of a column need no other program.
4. ``_totals``: adds up each job's entropy and shift.

The query heads of a KV head with all their window queries are the rows of one tile, so the keys
are read from memory once in each pass. Logits are kept as raw dot products until the largest of
the row is subtracted: ``exp2((raw - top) * c)`` keeps its precision where logits are large, which
``raw * c - top * c`` in one multiply-add does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress_kernels.scoring_passes_triton import columns, combine, row_sums
from kvcompress_kernels.transfer import Parcel, Sent, on_device

# Tokens per program of a pass at least, so that loading the queries stays a small part.
_MIN_SHARE = 512
_COMBINE_ROWS = 64
# Shared memory that is not tiles: sums across warps, and what the compiler rounds up.
_SPARE = 2048
# Devices with more shared memory than this multiply by warp groups (Hopper and later).
_WARP_GROUPS = 200 << 10
_LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class _Tiles:
    """Sizes of a program's work: query heads of a group, rows per head, tokens, warps, stages."""

    heads: int
    rows: int
    tokens: int
    warps: int
    stages: int


def _tiles(group: int, rows: int, dim: int, itemsize: int, shared: int) -> _Tiles:
    """Tile sizes for queries and keys of ``dim`` (padded) elements in ``shared`` bytes.

    The query tile (heads x rows) stays in shared memory, key tiles of 64 tokens stream past it;
    64 is the least a warp group multiplies, and more would take more registers. At Llama's shape
    (4 heads, 32 rows, 128 x 2 bytes) these are 32 KiB and 16 KiB a stage. With four stages two
    programs fit into an H100's multiprocessor (227 KiB), so that one computes exponentials while
    the other multiplies, and 64 KiB of keys are in flight; covering the memory's latency takes 20.
    Eight warps for 128 rows keep a thread's share of the products at 32 registers, without which
    two programs would not fit either. Groups of more than 128 rows go to several programs with
    neighbouring ids, which find the keys in the L2 cache: one program of 256 rows would have a
    multiprocessor to itself and nothing to overlap with. fp32 has no exact product on the tensor
    cores; its tiles are small because the operands are held in registers.

    Larger heads take tiles that fit: fewer rows, down to 64, then fewer keys, then fewer rows
    again. Where warp groups multiply, that is from Hopper on, a stage is given up before keys are.

    Raises:
        ValueError: The queries of one head do not fit.

    """
    padded, line = triton.next_power_of_2(rows), dim * itemsize
    tokens, most, least = (16, 32, 3) if itemsize > 2 else (64, 128, 3)
    while True:
        heads = max(1, min(triton.next_power_of_2(group), most // padded))
        tile_rows = max(padded, 16 // heads)  # a dot product takes at least 16 rows
        room = shared - _SPARE - heads * tile_rows * line
        if least * tokens * line <= room:
            break
        if most > 64:
            most //= 2
        elif least > 2 and shared > _WARP_GROUPS:
            least = 2
        elif tokens > 32 or (tokens > 16 and most <= 32):
            tokens //= 2
        elif most > 16:
            most //= 2
        elif least > 1:
            least -= 1
        else:
            raise ValueError(
                f"a window of {rows} queries of {dim} x {itemsize} bytes does not fit this GPU's "
                f"{shared >> 10} KiB of shared memory; lower the window"
            )
    stages = (shared // 2 - heads * tile_rows * line) // (tokens * line)
    warps = 8 if heads * tile_rows >= 128 or itemsize > 2 else 4
    return _Tiles(heads, tile_rows, tokens, warps, stages=min(max(stages, least), 4))


def paged_window_statistics(
    queries: Tensor,
    key_cache: Tensor,
    page_table: Tensor | Sent,
    num_tokens: Sequence[int],
    history: Sequence[int],
    scales: Sequence[float],
    soft_cap: float,
    sinks: Tensor | None,
    mean: Tensor,
    var: Tensor,
    parcel: Parcel | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments as in ``scoring.paged_window_statistics``, checked there.

    Fills each job's own columns of ``mean`` and ``var``.

    Returns:
        Entropy and shift, fp64 [R], and ``history`` on the device, int32 [R].

    """
    jobs, heads, rows, dim = queries.shape
    kv_heads, page = key_cache.shape[1:3]
    assert queries.stride(-1) == key_cache.stride(-1) == 1
    assert mean.is_contiguous()
    assert var.is_contiguous()
    device = queries.device
    group = heads // kv_heads
    operand = _operand(queries.dtype, key_cache.dtype)
    processors, shared = _size(device)
    tile_dim = max(16, triton.next_power_of_2(dim))
    tiles = _tiles(group, rows, tile_dim, operand.primitive_bitwidth // 8, shared)
    programs = kv_heads * triton.cdiv(group, tiles.heads)
    shares = [_share(tokens, programs, tiles.tokens, processors) for tokens in num_tokens]
    job_data, job_scales = _send(
        num_tokens, history, shares, scales, Parcel(device) if parcel is None else parcel
    )
    page_table = on_device(page_table)
    assert page_table.stride(-1) == 1

    splits = max(map(triton.cdiv, num_tokens, shares))
    partial = mean.new_empty((4, jobs, splits, heads * rows))
    whole = mean.new_empty((3, jobs, heads * rows))
    column_splits = max(map(triton.cdiv, history, shares))
    shifts = mean.new_empty((jobs, column_splits * programs))
    common = (
        queries,
        key_cache,
        page_table,
        job_data,
        job_scales,
        *queries.stride()[:3],
        *key_cache.stride()[:3],
        page_table.stride(0),
        jobs,
        heads,
        soft_cap,
    )
    sizes = {
        "GROUP": group,
        "ROWS": rows,
        "PAGE": page,
        "DIM": dim,
        "CAPPED": soft_cap > 0.0,
        # Triton's interpreter multiplies the bit patterns of bf16; fp32 gives the same products.
        "OPERAND": tl.float32 if device.type == "cpu" else operand,
        "TILE_HEADS": tiles.heads,
        "TILE_ROWS": tiles.rows,
        "TILE_TOKENS": tiles.tokens,
        "TILE_DIM": tile_dim,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    row_sums[(programs, splits, jobs)](*common, partial, **sizes)
    combine[(triton.cdiv(heads * rows, _COMBINE_ROWS), jobs)](
        partial,
        job_data,
        job_scales,
        whole if sinks is None else sinks.contiguous(),
        whole[0],
        whole[1],
        whole[2],
        splits,
        heads,
        jobs,
        ROWS=rows,
        CAPPED=soft_cap > 0.0,
        SINKS=sinks is not None,
        TILE=_COMBINE_ROWS,
        TILE_SPLITS=16,
        num_warps=4,
    )
    columns[(programs, column_splits, jobs)](
        *common,
        whole[0],
        whole[1],
        mean,
        var,
        shifts,
        mean.shape[2],
        FULL=tiles.rows == rows,
        **sizes,
    )
    sums = torch.empty((2, jobs), dtype=torch.float64, device=device)
    _totals[(jobs,)](
        whole[2],
        shifts,
        sums,
        whole.shape[2],
        shifts.shape[1],
        jobs,
        TILE=1024,
        num_warps=4,
    )
    return sums[0], sums[1], job_data[1]


def _operand(queries: torch.dtype, keys: torch.dtype) -> tl.dtype:
    """Type that the dot products are taken in: it holds the values of both exactly."""
    wide = queries if keys.itemsize == 1 or keys == queries else torch.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(wide, tl.float32)


def _size(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of shared memory of each; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    # AMD's devices have no larger size to opt in to, and no such property.
    least = properties.shared_memory_per_block
    shared = getattr(properties, "shared_memory_per_block_optin", least)
    return properties.multi_processor_count, shared


def _share(tokens: int, programs: int, tile: int, processors: int) -> int:
    """Tokens per program such that one job fills the device with two programs a multiprocessor.

    It depends on the job alone: what is launched beside it must not change how its sums are
    grouped, or equal prompts would get scores that differ in the last bits.
    """
    splits = max(1, 2 * processors // programs)
    return max(triton.cdiv(triton.cdiv(tokens, splits), tile) * tile, _MIN_SHARE)


def _send(
    num_tokens: Sequence[int],
    history: Sequence[int],
    shares: Sequence[int],
    scales: Sequence[float],
    parcel: Parcel,
) -> tuple[Tensor, Tensor]:
    """Int32 [3, R] and fp32 [R] on the device, with what else is in the parcel."""
    job_data = parcel.add(np.asarray((num_tokens, history, shares), dtype=np.int32))
    job_scales = parcel.add(np.asarray(scales, dtype=np.float32))
    return job_data.on_device(), job_scales.on_device()


@triton.jit(
    do_not_specialize=["rows", "parts", "jobs"],
    do_not_specialize_on_alignment=["entropies", "shifts", "out"],
)
def _totals(
    entropies,  # fp32 [jobs, rows], in bits
    shifts,  # fp32 [jobs, parts]
    out,  # fp64 [2, jobs]
    rows,
    parts,
    jobs,
    TILE: tl.constexpr,
):
    """Sums of one job, the entropy in nats.

    Zeros behind its own parts change nothing, and neither do the jobs beside it.
    """
    job = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    entropy = tl.zeros([TILE], tl.float64)
    for start in range(0, rows, TILE):
        at = start + lanes
        part = tl.load(entropies + job * rows + at, mask=at < rows, other=0.0)
        entropy += part.to(tl.float64)
    shift = tl.zeros([TILE], tl.float64)
    for start in range(0, parts, TILE):
        at = start + lanes
        part = tl.load(shifts + job * parts + at, mask=at < parts, other=0.0)
        shift += part.to(tl.float64)
    tl.store(out + job, tl.sum(entropy, 0) * tl.full([], _LN2, tl.float64))
    tl.store(out + jobs + job, tl.sum(shift, 0))

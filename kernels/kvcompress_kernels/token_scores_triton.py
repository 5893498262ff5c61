# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""Triton kernel of ``selection.token_scores``: indicator, pooling and heads in one pass.

``selection_triton`` imports it and hands it out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pooled(scores, lanes, KERNEL, AVERAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum or maximum of KERNEL neighbouring lanes; void in the outer KERNEL // 2 lanes."""
    result = scores
    for side in tl.static_range(2):
        for distance in range(1, KERNEL // 2 + 1):
            shifted = lanes + (distance if side == 0 else -distance)
            shifted = tl.minimum(tl.maximum(shifted, 0), BLOCK - 1)
            other = tl.gather(scores, shifted, axis=0)
            if AVERAGE:
                result += other
            else:
                result = tl.maximum(result, other, propagate_nan=tl.PropagateNan.ALL)
    return result


# Requests may choose the width of the pooling, so it is no constant.
@triton.jit(
    do_not_specialize=[
        *("tokens", "mean_job", "mean_head", "var_job", "var_head", "gamma", "KERNEL"),
    ],
    do_not_specialize_on_alignment=["mean", "var", "out", "lengths"],
)
def _token_scores_kernel(
    mean,  # fp32 [jobs, heads, tokens]
    var,  # the same shape; not read unless HAS_VAR
    out,  # fp32 [jobs, kv_heads, tokens], contiguous
    lengths,  # int32 [jobs]; not read unless HAS_LENGTHS
    tokens,
    mean_job,
    mean_head,
    var_job,
    var_head,
    gamma,
    GROUP: tl.constexpr,
    KERNEL,
    AVERAGE: tl.constexpr,
    REDUCE_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kv_head = tl.program_id(1)
    job = tl.program_id(2)
    lanes = tl.arange(0, BLOCK)
    # Tiles overlap by the halo: KERNEL // 2 lanes at either end only lend their scores.
    half = KERNEL // 2
    at = tl.program_id(0) * (BLOCK - 2 * half) - half + lanes
    length = tokens
    if HAS_LENGTHS:
        length = tl.load(lengths + job)
    inside = (at >= 0) & (at < length)
    outside: tl.constexpr = 0.0 if AVERAGE else float("-inf")
    # A sum of sums and a maximum of maxima can be taken heads first: one pooling for the group.
    heads_first: tl.constexpr = AVERAGE == REDUCE_MEAN
    reduced = tl.full([BLOCK], 0.0 if REDUCE_MEAN else float("-inf"), dtype=tl.float32)
    for member in range(GROUP):
        head = (kv_head * GROUP + member).to(tl.int64)
        rows = mean + job.to(tl.int64) * mean_job + head * mean_head
        score = tl.load(rows + at, mask=inside, other=outside)
        if HAS_VAR:
            rows = var + job.to(tl.int64) * var_job + head * var_head
            score += gamma * tl.load(rows + at, mask=inside, other=0.0)
        if not heads_first:
            score = _pooled(score, lanes, KERNEL, AVERAGE, BLOCK)
        if REDUCE_MEAN:
            reduced += score
        else:
            reduced = tl.maximum(reduced, score, propagate_nan=tl.PropagateNan.ALL)
    if heads_first:
        reduced = _pooled(reduced, lanes, KERNEL, AVERAGE, BLOCK)
    divisor = (KERNEL if AVERAGE else 1) * (GROUP if REDUCE_MEAN else 1)
    own = (lanes >= half) & (lanes < BLOCK - half) & (at < length)
    row = job.to(tl.int64) * tl.num_programs(1) + kv_head
    tl.store(out + row * tokens + at, reduced / divisor, mask=own)


def token_scores(
    mean: Tensor,
    var: Tensor | None,
    out: Tensor,
    *,
    gamma: float,
    kernel: int,
    average: bool,
    reduce_mean: bool,
    lengths: Tensor | None,
) -> None:
    """Fill ``out``: fp32 [R, N, S'], contiguous. ``mean``, ``var``: fp32 [R, H, S'], last dimension
    contiguous; no dimension is empty, H is a multiple of N, ``kernel`` is odd."""
    jobs, heads, tokens = mean.shape
    kv_heads = out.shape[1]
    assert out.is_contiguous()
    for tensor in (mean,) if var is None else (mean, var):
        assert tensor.shape == mean.shape
        assert tensor.dtype == torch.float32
        assert tensor.stride(2) == 1 or tokens == 1
    second = mean if var is None else var
    block = max(1024, triton.next_power_of_2(4 * kernel))
    _token_scores_kernel[(triton.cdiv(tokens, block - kernel + 1), kv_heads, jobs)](
        mean,
        second,
        out,
        mean if lengths is None else lengths,
        tokens,
        mean.stride(0),
        mean.stride(1),
        second.stride(0),
        second.stride(1),
        gamma,
        GROUP=heads // kv_heads,
        KERNEL=kernel,
        AVERAGE=average,
        REDUCE_MEAN=reduce_mean,
        HAS_VAR=var is not None,
        HAS_LENGTHS=lengths is not None,
        BLOCK=block,
        num_warps=4,
    )

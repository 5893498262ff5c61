"""From token scores to kept tokens: smoothing, sharing between query heads, deterministic ranking.

Ranking never depends on how a device breaks ties: of equal scores the lower token id is kept, and
the layer counts of DynamicKV are the exact sizes of a global top-k under that rule. CPU and GPU,
and ranks of a tensor-parallel group, therefore agree as soon as their scores do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton
from kvcompress_kernels.selection_torch import top
from kvcompress_kernels.transfer import Parcel


def pool_tokens(scores: Tensor, kernel: int, mode: Literal["avg", "max"]) -> Tensor:
    """Smooth scores along the tokens, so that the neighbours of a kept token tend to be kept, too.

    The input is not changed. Source: CAKE and SnapKV pool with width 5, DynamicKV with 7 (released
    code of each).

    Args:
        scores: [..., S'], any float dtype.
        kernel: Odd width in tokens; 1 changes nothing.
        mode: "avg" pads with zeros and always divides by ``kernel``, so the ends are damped; "max"
            ignores what lies outside, which for the non-negative attention scores is the same as
            padding with zeros.

    Returns:
        fp32 of the same shape.

    Raises:
        ValueError: The kernel is even or not positive, or the mode is unknown.

    """
    _check_pooling(kernel, mode)
    scores = scores.float()
    if kernel == 1:
        return scores.clone()
    # Shifted rows, one after another: what torch's own pooling adds in the same order, but for
    # single tokens.
    tokens, margin = scores.shape[-1], kernel // 2
    wide = F.pad(scores, (margin, margin), value=0.0 if mode == "avg" else -math.inf)
    first, *others = (wide[..., shift : shift + tokens] for shift in range(kernel))
    pooled = first.clone()
    for shifted in others:
        if mode == "avg":
            pooled += shifted
        else:
            torch.maximum(pooled, shifted, out=pooled)
    return pooled.div_(kernel) if mode == "avg" else pooled


def grouped(scores: Tensor, num_kv_heads: int) -> Tensor:
    """View [H, S'] as [N, H / N, S']: the query heads that share each KV head.

    Raises:
        ValueError: H is not a multiple of N.

    """
    heads = scores.shape[0]
    _check_heads(heads, num_kv_heads)
    return scores.reshape(num_kv_heads, heads // num_kv_heads, *scores.shape[1:])


def _check_heads(heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(f"{heads} query heads cannot be shared by {num_kv_heads} KV heads")


def _check_pooling(kernel: int, mode: str) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"the pooling kernel must be an odd number of at least 1, got {kernel}")
    if mode not in ("avg", "max"):
        raise ValueError(f'the pooling mode must be "avg" or "max", got {mode!r}')


def token_scores(
    mean: Tensor,
    var: Tensor | None,
    *,
    gamma: float,
    kernel: int,
    mode: Literal["avg", "max"],
    num_kv_heads: int,
    reduce: Literal["mean", "max"] = "mean",
    lengths: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return scores of tokens per KV head: mean + gamma * var, pooled, reduced over query heads.

    The inputs are not changed. The Triton kernel reads each score once (and kernel - 1 more columns
    per tile of about a thousand). Its result differs from the torch implementation by fp32
    rounding: it adds in another order.

    Source: CAKE's eviction indicator (arXiv 2503.12491, equation 9); gamma = 0 gives the scores of
    SnapKV (arXiv 2404.14469) and DynamicKV (arXiv 2412.14838).

    Args:
        mean: fp32 [..., H, S'], last dimension contiguous (otherwise it is copied on a GPU).
        var: The same shape, or None; it is not read if it is None or ``gamma`` is 0.
        gamma: Weight of the variance.
        kernel: As for :func:`pool_tokens`.
        mode: As for :func:`pool_tokens`.
        num_kv_heads: N.
        reduce: How the H / N query heads of each KV head are reduced.
        lengths: int32 [...], how many of the S' tokens each job has, on the device: columns beyond
            hold anything, here and in the result. None: all.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Returns:
        fp32 [..., N, S'], contiguous.

    Raises:
        ValueError: Shapes or types do not fit, or :func:`pool_tokens` would raise it.

    """
    _check_pooling(kernel, mode)
    if reduce not in ("mean", "max"):
        raise ValueError(f'the heads of a group are reduced by "mean" or "max", not {reduce!r}')
    if gamma == 0.0:
        var = None
    *jobs, heads, tokens = mean.shape
    _check_heads(heads, num_kv_heads)
    for name, tensor in (("mean", mean), ("var", mean if var is None else var)):
        if tensor.dtype != torch.float32 or tensor.shape != mean.shape:
            raise ValueError(
                f"{name} must be torch.float32 {list(mean.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    if use_triton(mean, implementation):
        out = torch.empty(
            math.prod(jobs), num_kv_heads, tokens, dtype=torch.float32, device=mean.device
        )
        if out.numel():
            triton_kernels("selection").token_scores(
                _three_dimensions(mean),
                None if var is None else _three_dimensions(var),
                out,
                gamma=gamma,
                kernel=kernel,
                average=mode == "avg",
                reduce_mean=reduce == "mean",
                lengths=lengths,
            )
        return out.view(*jobs, num_kv_heads, tokens)
    indicator = mean if var is None else mean.add(var, alpha=gamma)
    if lengths is not None:
        beyond = torch.arange(tokens, device=mean.device) >= lengths[..., None, None]
        indicator = indicator.masked_fill(beyond, 0.0 if mode == "avg" else -math.inf)
    grouped_shape = (*jobs, num_kv_heads, heads // num_kv_heads, tokens)
    pooled = pool_tokens(indicator, kernel, mode).reshape(grouped_shape)
    return (pooled.mean(dim=-2) if reduce == "mean" else pooled.amax(dim=-2)).contiguous()


def _three_dimensions(scores: Tensor) -> Tensor:
    """[..., H, S'] as [R, H, S'] with contiguous rows; a view wherever one exists."""
    scores = scores[None] if scores.dim() == 2 else scores.flatten(0, -3)
    return scores if scores.stride(2) == 1 else scores.contiguous()


def token_scores_cost(
    *, jobs: int, heads: int, kv_heads: int, tokens: int, kernel: int, has_var: bool
) -> Cost:
    """Return the least work of :func:`token_scores` for [jobs, heads, tokens].

    Pooling counts once per KV head. That is the least: it holds for "avg" with "mean" and "max"
    with "max", where heads can be reduced before they are pooled.

    Args:
        jobs: R.
        heads: Query heads.
        kv_heads: KV heads.
        tokens: Columns.
        kernel: Width of the pooling.
        has_var: Whether the variance is read.

    """
    read, written = jobs * heads * tokens, jobs * kv_heads * tokens
    operands = 2 if has_var else 1
    return Cost(
        bytes=4 * (read * operands + written), flops=read * (2 * operands - 1) + written * kernel
    )


def select_tokens(
    scores: Tensor | Sequence[Tensor],
    counts: Sequence[int],
    *,
    tails: Sequence[int] | None = None,
    parcel: Parcel | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return the best tokens of every head of many jobs (layers, requests) at once.

    The inputs are not changed. Of equal scores the lower id is kept; NaN ranks above everything, as
    in torch.sort, and -0.0 equals 0.0. The result is exact and the same on every device. On a GPU
    every (job, head) row is one program that reads its scores four times and sorts nothing; jobs
    may lie anywhere and differ in length.

    Args:
        scores: fp32 [R, N, S], or R of [N, S_r]; higher is better, any strides (a last dimension
            that is not contiguous is copied on a GPU).
        counts: [R], how many tokens each head of a job keeps, 0 <= counts[r] <= S_r.
        tails: [R], how many tokens from S_r on follow the chosen ones; None: none.
        parcel: Addresses and counts are sent to the device with what waits in it.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Returns:
        int32 [R, N, max(counts + tails)]: ascending token ids, -1 behind a job's own.

    Raises:
        ValueError: Shapes or types do not fit, or counts are out of range.

    """
    jobs, heads = _jobs_of(scores)
    tails = [0] * len(jobs) if tails is None else tails
    if len(counts) != len(jobs) or len(tails) != len(jobs):
        raise ValueError(f"{len(counts)} counts do not fit {len(jobs)} jobs")
    for job, count in zip(jobs, counts, strict=True):
        if not 0 <= count <= job.shape[1]:
            raise ValueError(f"cannot select {count} of {job.shape[1]} tokens")
    width = max(map(sum, zip(counts, tails, strict=True)), default=0)
    device = scores.device if isinstance(scores, Tensor) else jobs[0].device
    shape = (len(jobs), heads, width)
    if jobs and use_triton(jobs[0], implementation):
        kept = torch.empty(shape, dtype=torch.int32, device=device)
        if kept.numel():
            rows = [job if job.stride(1) == 1 else job.contiguous() for job in jobs]
            triton_kernels("selection").select_tokens(rows, counts, tails, kept, parcel)
        return kept
    kept = torch.full(shape, -1, dtype=torch.int32, device=device)
    for own, job, count, tail in zip(kept, jobs, counts, tails, strict=True):
        own[:, :count] = top(job, count)
        recent = torch.arange(job.shape[1], job.shape[1] + tail, dtype=torch.int32, device=device)
        own[:, count : count + tail] = recent
    return kept


def _jobs_of(scores: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Each job's scores, and the number of heads, which all have."""
    kinds = {(job.dim(), job.dtype, *job.shape[:1]) for job in scores}
    if isinstance(scores, Tensor):
        kinds = {(scores.dim() - 1, scores.dtype, *scores.shape[1:2])}
    if len(kinds) == 1:
        ((dims, dtype, *heads),) = kinds
        if dims == 2 and dtype == torch.float32:
            return list(scores), int(heads[0])
    raise ValueError(f"scores must be torch.float32 [R, N, S], got jobs of {kinds}")


def selection_cost(*, jobs: int, heads: int, tokens: int, count: int) -> Cost:
    """Return the least work of a selection: scores are read once, int32 ids are written.

    Comparisons are not counted as floating-point operations.

    Args:
        jobs: R; layers in :func:`~kvcompress_kernels.winners.winners_per_layer`.
        heads: KV heads.
        tokens: Columns.
        count: Tokens kept by each head; 0 there.

    """
    return Cost(bytes=4 * jobs * heads * (tokens + count), flops=0)


def top_tokens(scores: Tensor, count: int, implementation: Implementation = "auto") -> Tensor:
    """Return the best tokens of every head.

    Of equal scores the lower id is kept. NaN ranks above everything, as in torch.sort.

    Args:
        scores: [N, S'], higher is better.
        count: Tokens that each head keeps.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Returns:
        int64 [N, count], ascending token ids on the same device.

    Raises:
        ValueError: Not 0 <= count <= S'.

    """
    tokens = scores.shape[1]
    if not 0 <= count <= tokens:
        raise ValueError(f"cannot select {count} of {tokens} tokens")
    if use_triton(scores, implementation):
        # The images that are ranked are those of fp32, which holds the half types exactly.
        kept = select_tokens(scores.float()[None], [count], implementation=implementation)
        return kept[0].long()
    return top(scores, count)

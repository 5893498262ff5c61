"""From token scores to kept tokens: smoothing, sharing between query heads, deterministic ranking.

Ranking never depends on how a device breaks ties: equal scores keep the lower token id, and the
layer counts of DynamicKV are the exact sizes of a global top-k under that rule. CPU and GPU, and
ranks of a tensor-parallel group, therefore agree as soon as their scores do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton

_RADIX = 1 << 11  # bins of a histogram: 32 bits are read as digits of 11, 11 and 10
_HALF = (torch.float16, torch.bfloat16)


def pool_tokens(scores: Tensor, kernel: int, mode: Literal["avg", "max"]) -> Tensor:
    """Smooth scores along tokens so that a kept token brings its neighbours with it.

    ``scores``: [..., S'], any float dtype. ``kernel``: odd width in tokens, 1 changes nothing.
    ``mode``: "avg" pads with zeros and always divides by ``kernel``, so the ends are damped;
    "max" ignores what lies outside, which for the non-negative attention scores is the same as
    padding with zeros. Returns fp32 of the same shape; the input is not changed.

    Raises ValueError for an even or non-positive kernel and for an unknown mode.
    Source: CAKE and SnapKV pool with width 5, DynamicKV with 7 (released code of each).
    """
    _check_pooling(kernel, mode)
    scores = scores.float()
    if kernel == 1:
        return scores.clone()
    rows = scores.reshape(-1, 1, scores.shape[-1])
    pool = F.avg_pool1d if mode == "avg" else F.max_pool1d
    return pool(rows, kernel, stride=1, padding=kernel // 2).reshape(scores.shape)


def group_mean(scores: Tensor, num_kv_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: [H, S'] -> [N, S'], dtype kept.

    Raises ValueError if H is not a multiple of ``num_kv_heads``.
    Source: CAKE, last step of the eviction indicator (released modify_llama.py).
    """
    return grouped(scores, num_kv_heads).mean(dim=1)


def grouped(scores: Tensor, num_kv_heads: int) -> Tensor:
    """View [H, S'] as [N, H / N, S']; raises ValueError if H is not a multiple of N."""
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
    lengths: Sequence[int] | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Scores of a KV head's tokens: mean + gamma * var, pooled, reduced over its query heads.

    ``mean``: fp32 [..., H, S'], last dimension contiguous (otherwise it is copied on a GPU).
    ``var``: the same shape, or None; it is not read if it is None or ``gamma`` is 0. ``kernel``
    and ``mode``: as in ``pool_tokens``. ``reduce``: over the H / N query heads of each of the N =
    ``num_kv_heads`` KV heads. ``lengths``: for [R, H, S'] only, how many columns each of the R jobs
    has; what lies beyond is not read and comes out as 0. It has no influence on the columns before:
    to "avg" it is zero padding, to "max" it is outside.

    Returns fp32 [..., N, S'], contiguous; the inputs are not changed. The Triton kernel reads each
    score once (and a halo of kernel - 1 columns per tile of about a thousand). Its result differs
    from the torch twin by fp32 rounding: it adds up in another order.

    Raises ValueError for shapes or types that do not fit, and where ``pool_tokens`` does.
    Source: CAKE's eviction indicator (arXiv 2503.12491, equation 9); gamma = 0 gives the scores of
    SnapKV (arXiv 2404.14469) and DynamicKV (arXiv 2412.14838).
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
    if lengths is not None:
        if len(jobs) != 1 or len(lengths) != jobs[0]:
            raise ValueError(f"{len(lengths)} lengths do not fit scores {list(mean.shape)}")
        _check_lengths(lengths, tokens)
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
    beyond = None
    if lengths is not None:
        columns = torch.arange(tokens, device=mean.device)
        beyond = columns >= torch.tensor(lengths, device=mean.device)[:, None, None]
        indicator = indicator.masked_fill(beyond, 0.0 if mode == "avg" else -math.inf)
    grouped_shape = (*jobs, num_kv_heads, heads // num_kv_heads, tokens)
    pooled = pool_tokens(indicator, kernel, mode).reshape(grouped_shape)
    scores = (pooled.mean(dim=-2) if reduce == "mean" else pooled.amax(dim=-2)).contiguous()
    return scores if beyond is None else scores.masked_fill_(beyond, 0.0)


def _three_dimensions(scores: Tensor) -> Tensor:
    """[..., H, S'] as [R, H, S'] with contiguous rows; a view wherever one exists."""
    scores = scores[None] if scores.dim() == 2 else scores.flatten(0, -3)
    return scores if scores.stride(2) == 1 else scores.contiguous()


def _check_lengths(lengths: Sequence[int], tokens: int) -> None:
    if any(not 0 <= length <= tokens for length in lengths):
        raise ValueError(f"lengths must be between 0 and {tokens}, got {list(lengths)}")


def token_scores_cost(
    *, jobs: int, heads: int, kv_heads: int, tokens: int, kernel: int, has_var: bool
) -> Cost:
    """What ``token_scores`` has to do for [jobs, heads, tokens]; pooling counts once per KV head.

    That is the least: it holds for "avg" with "mean" and "max" with "max", where heads can be
    reduced before they are pooled.
    """
    read, written = jobs * heads * tokens, jobs * kv_heads * tokens
    operands = 2 if has_var else 1
    return Cost(
        bytes=4 * (read * operands + written), flops=read * (2 * operands - 1) + written * kernel
    )


def select_tokens(
    scores: Tensor,
    counts: Sequence[int] | Tensor,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """The best tokens of every head of many jobs (layers, requests) at once.

    ``scores``: fp32 [R, N, S], higher is better, any strides (a last dimension that is not
    contiguous is copied on a GPU). ``counts``: how many tokens each head of job r keeps, R integers
    with 0 <= counts[r] <= lengths[r]. ``lengths``: columns of job r that take part, S by default.

    Returns int32 [R, N, max(counts)]: ascending token ids, -1 from entry counts[r] on. The inputs
    are not changed. Among equal scores the lower id is kept; NaN ranks above everything, as in
    torch.sort, and -0.0 equals 0.0. The result is exact and the same on every device.

    ``counts`` and ``lengths`` are needed on the host: given as tensors on a GPU, each costs one
    synchronisation; given as sequences or CPU tensors, none. On a GPU every (job, head) row is one
    program that reads its scores four times and sorts nothing.

    Raises ValueError for shapes or types that do not fit and for counts or lengths out of range.
    """
    if scores.dim() != 3 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores must be torch.float32 [R, N, S], got {scores.dtype} {list(scores.shape)}"
        )
    jobs, heads, tokens = scores.shape
    keep = _host_integers(counts)
    sizes = [tokens] * jobs if lengths is None else _host_integers(lengths)
    if len(keep) != jobs or len(sizes) != jobs:
        raise ValueError(f"{len(keep)} counts and {len(sizes)} lengths do not fit {jobs} jobs")
    _check_lengths(sizes, tokens)
    for count, size in zip(keep, sizes, strict=True):
        if not 0 <= count <= size:
            raise ValueError(f"cannot select {count} of {size} tokens")
    shape = (jobs, heads, max(keep, default=0))
    if use_triton(scores, implementation):
        kept = torch.empty(shape, dtype=torch.int32, device=scores.device)
        if kept.numel():
            rows = scores if scores.stride(2) == 1 else scores.contiguous()
            triton_kernels("selection").select_tokens(rows, keep, sizes, kept)
        return kept
    kept = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    for job, (count, size) in enumerate(zip(keep, sizes, strict=True)):
        kept[job, :, :count] = _top(scores[job, :, :size], count)
    return kept


def _host_integers(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]


def selection_cost(*, jobs: int, heads: int, tokens: int, count: int) -> Cost:
    """What selecting ``count`` of ``tokens`` has to move: scores in once, int32 ids out.

    Comparisons are not counted as floating-point operations. With ``count`` = 0 it is the cost of
    ``winners_per_layer`` over ``jobs`` layers.
    """
    return Cost(bytes=4 * jobs * heads * (tokens + count), flops=0)


def top_tokens(scores: Tensor, count: int, implementation: Implementation = "auto") -> Tensor:
    """The ``count`` best tokens of every head, as ascending token ids.

    ``scores``: [N, S'], higher is better. Returns int64 [N, count] on the same device. Among equal
    scores the lower id is kept. NaN ranks above everything, as in torch.sort.

    Raises ValueError unless 0 <= count <= S'.
    """
    tokens = scores.shape[1]
    if not 0 <= count <= tokens:
        raise ValueError(f"cannot select {count} of {tokens} tokens")
    if use_triton(scores, implementation):
        # The images that are ranked are those of fp32, which holds the half types exactly.
        kept = select_tokens(scores.float()[None], [count], implementation=implementation)
        return kept[0].long()
    return _top(scores, count)


def _top(scores: Tensor, count: int) -> Tensor:
    """``top_tokens`` in torch, and in NumPy on the CPU, where it is some thirty times faster."""
    heads, tokens = scores.shape
    if count == 0:
        return torch.empty(heads, 0, dtype=torch.int64, device=scores.device)
    if count == tokens:
        return torch.arange(tokens, device=scores.device).repeat(heads, 1)
    if scores.device.type == "cpu":
        return torch.from_numpy(_top_numpy(_as_numpy(scores), count))
    return _top_sorted(scores, count)


def _top_sorted(scores: Tensor, count: int) -> Tensor:
    """``_top`` for any device."""
    ranked = torch.sort(_ordered_bits(scores), dim=-1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=-1).values


def _as_numpy(scores: Tensor) -> npt.NDArray[Any]:
    scores = scores.detach()
    return (scores.float() if scores.dtype in _HALF else scores).numpy()


def _top_numpy(scores: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Int64 [N, count] for 0 < count < S'. NumPy puts NaN last, that is on top, like torch."""
    heads, tokens = scores.shape
    split = tokens - count
    threshold = np.partition(scores, split, axis=1)[:, split : split + 1]
    chosen = np.less(scores, threshold)
    # Not >=, which would miss NaN. Every row has at least ``count`` of these.
    ids = np.flatnonzero(np.logical_not(chosen, out=chosen))
    if ids.size == heads * count:
        return ids.reshape(heads, count) - np.arange(heads, dtype=np.int64)[:, None] * tokens
    kept = np.empty((heads, count), dtype=np.int64)
    for row, limit, out in zip(scores, threshold[:, 0], kept, strict=True):
        above, tied = _above_and_tied(row, limit)
        first = np.flatnonzero(above)
        out[: first.size] = first
        out[first.size :] = np.flatnonzero(tied)[: count - first.size]
        out.sort()
    return kept


def _above_and_tied(
    scores: npt.NDArray[Any], limit: Any
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which scores rank above ``limit`` and which equal it, with every NaN equal and on top."""
    if np.isnan(limit):
        return np.zeros(scores.shape, dtype=np.bool_), np.isnan(scores)
    return np.logical_not(scores <= limit), scores == limit


def winners_per_layer(
    scores: Sequence[Tensor], k: int, implementation: Implementation = "auto"
) -> npt.NDArray[np.int64]:
    """How many of the ``k`` best entries over all layers each layer holds.

    ``scores``: one tensor [heads, S'] per layer, fp32 (others are converted), all on one device;
    lengths may differ. Returns int64 [len(scores)] that sums to min(k, number of entries). Among
    equal scores the lower (layer, head, token) wins, and NaN ranks above everything.

    On a GPU the k-th largest value is found digit by digit from histograms that stay there: scores
    are neither concatenated nor sorted, and the host waits for the device once, for the result.
    That takes fewer than 2 ** 31 entries.

    Raises ValueError if k is negative. Source: DynamicKV, per-layer counts of a global top-k
    (arXiv 2412.14838, equations 4 and 5).
    """
    if k < 0:
        raise ValueError(f"the number of winners must not be negative, got {k}")
    sizes = np.array([layer.numel() for layer in scores], dtype=np.int64)
    if k >= sizes.sum():
        return sizes
    if k == 0:
        return np.zeros(len(scores), dtype=np.int64)
    if use_triton(scores[0], implementation):
        counts: npt.NDArray[np.int64]
        counts = triton_kernels("selection").winners_per_layer(scores, k).cpu().numpy()
        return counts
    if scores[0].device.type == "cpu":
        return _winners_numpy([_as_numpy(layer.float()).ravel() for layer in scores], k)
    return _winners_torch(scores, k)


def _winners_numpy(scores: Sequence[npt.NDArray[Any]], k: int) -> npt.NDArray[np.int64]:
    every = np.concatenate(scores)
    split = every.size - k
    every.partition(split)
    parts = [_above_and_tied(layer, every[split]) for layer in scores]
    above = np.array([np.count_nonzero(part) for part, _ in parts], dtype=np.int64)
    ties = np.array([np.count_nonzero(part) for _, part in parts], dtype=np.int64)
    return _share_ties(above, ties, k)


def _share_ties(
    above: npt.NDArray[np.int64], ties: npt.NDArray[np.int64], k: int
) -> npt.NDArray[np.int64]:
    """Add to ``above`` what each layer gets of the ties, which the layers take in order."""
    before = np.cumsum(ties) - ties
    result: npt.NDArray[np.int64] = above + np.clip(k - above.sum() - before, 0, ties)
    return result


def _winners_torch(scores: Sequence[Tensor], k: int) -> npt.NDArray[np.int64]:
    """From three small histograms per layer, one synchronisation each."""
    counts = np.zeros(len(scores), dtype=np.int64)
    keys = [_ordered_bits(layer).flatten() for layer in scores]
    wanted = k
    for shift in (21, 10, 0):
        digits = [_digit(key, shift) for key in keys]
        counted = torch.stack([torch.bincount(d, minlength=_RADIX) for d in digits]).cpu().numpy()
        threshold, wanted = _bin_of_kth(counted.sum(axis=0), wanted)
        counts += counted[:, threshold + 1 :].sum(axis=1)
        ties = counted[:, threshold]
        keys = [key[digit == threshold] for key, digit in zip(keys, digits, strict=True)]
    return _share_ties(counts, ties, k)


def _ordered_bits(scores: Tensor) -> Tensor:
    """Map fp32 to int32 so that the order of the numbers is kept, equal ones stay equal (-0.0 and
    0.0 are) and every NaN is the largest integer."""
    bits = scores.detach().float().contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return keys.masked_fill_(magnitude > 0x7F800000, 0x7FFFFFFF)


def _digit(keys: Tensor, shift: int) -> Tensor:
    """Bits of ``keys`` from ``shift`` on, as a bin of the histogram; the top digit has the sign."""
    if shift == 21:
        return (keys >> shift) + _RADIX // 2
    return (keys >> shift) & (_RADIX - 1 if shift else (1 << 10) - 1)


def _bin_of_kth(counts: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest entry, how many entries of that bin are still wanted)."""
    from_top = np.cumsum(counts[::-1])
    steps = int(np.searchsorted(from_top, k))
    above = int(from_top[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, k - above

"""From token scores to kept tokens: smoothing, sharing between query heads, deterministic ranking.

Ranking never depends on how a device breaks ties: equal scores keep the lower token id, and the
layer counts of DynamicKV are the exact sizes of a global top-k under that rule. CPU and GPU, and
ranks of a tensor-parallel group, therefore agree as soon as their scores do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_RADIX = 1 << 11  # bins of a histogram: 32 bits are read as digits of 11, 11 and 10


def pool_tokens(scores: Tensor, kernel: int, mode: Literal["avg", "max"]) -> Tensor:
    """Smooth scores along tokens so that a kept token brings its neighbours with it.

    ``scores``: [..., S'], any float dtype. ``kernel``: odd width in tokens, 1 changes nothing.
    ``mode``: "avg" pads with zeros and always divides by ``kernel``, so the ends are damped;
    "max" ignores what lies outside, which for the non-negative attention scores is the same as
    padding with zeros. Returns fp32 of the same shape; the input is not changed.

    Raises ValueError for an even or non-positive kernel and for an unknown mode.
    Source: CAKE and SnapKV pool with width 5, DynamicKV with 7 (released code of each).
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"the pooling kernel must be an odd number of at least 1, got {kernel}")
    if mode not in ("avg", "max"):
        raise ValueError(f'the pooling mode must be "avg" or "max", got {mode!r}')
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
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(f"{heads} query heads cannot be shared by {num_kv_heads} KV heads")
    return scores.reshape(num_kv_heads, heads // num_kv_heads, *scores.shape[1:])


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best tokens of every head, as ascending token ids.

    ``scores``: [N, S'], higher is better. Returns int64 [N, count] on the same device. Among equal
    scores the lower id is kept. NaN ranks above everything, as in torch.sort.

    Raises ValueError unless 0 <= count <= S'.
    """
    heads, tokens = scores.shape
    if not 0 <= count <= tokens:
        raise ValueError(f"cannot select {count} of {tokens} tokens")
    if count == tokens:
        return torch.arange(tokens, device=scores.device).repeat(heads, 1)
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=-1).values


def winners_per_layer(scores: Sequence[Tensor], k: int) -> npt.NDArray[np.int64]:
    """How many of the ``k`` best entries over all layers each layer holds.

    ``scores``: one tensor [heads, S'] per layer, fp32 (others are converted); lengths may differ.
    Returns int64 [len(scores)] that sums to min(k, number of entries). Among equal scores the lower
    (layer, head, token) wins.

    The k-th largest value is found digit by digit from three small histograms per layer, so the
    scores are neither concatenated nor sorted: O(entries) time on any device.

    Raises ValueError if k is negative. Source: DynamicKV, per-layer counts of a global top-k
    (arXiv 2412.14838, equations 4 and 5).
    """
    if k < 0:
        raise ValueError(f"the number of winners must not be negative, got {k}")
    sizes = np.array([layer.numel() for layer in scores], dtype=np.int64)
    if k >= sizes.sum():
        return sizes
    counts = np.zeros(len(scores), dtype=np.int64)
    if k == 0:
        return counts
    keys = [_ordered_bits(layer) for layer in scores]
    wanted = k
    for shift in (21, 10, 0):
        digits = [_digit(key, shift) for key in keys]
        counted = torch.stack([torch.bincount(d, minlength=_RADIX) for d in digits]).cpu().numpy()
        threshold, wanted = _bin_of_kth(counted.sum(axis=0), wanted)
        counts += counted[:, threshold + 1 :].sum(axis=1)
        ties = counted[:, threshold]
        keys = [key[digit == threshold] for key, digit in zip(keys, digits, strict=True)]
    before = np.cumsum(ties) - ties
    result: npt.NDArray[np.int64] = counts + np.clip(wanted - before, 0, ties)
    return result


def _ordered_bits(scores: Tensor) -> Tensor:
    """Map fp32 to int32 so that the order of the numbers is kept."""
    values = scores.detach().float().flatten() + 0.0  # makes -0.0 equal to 0.0
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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

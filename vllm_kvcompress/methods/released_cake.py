"""CAKE's released arithmetic, losses included, for the faithful mode.

Source: cakekv, the file that each function names.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor


class Preference(NamedTuple):
    """H (nats), V and P of one layer, summed over the batch, as the release rounds them."""

    dispersion: float
    shift: float
    preference: float


class LayerBudgets(NamedTuple):
    """Integer budgets of the layers seen, in history tokens.

    Attributes:
        raw: After the fix-up.
        clipped: At most the history.

    """

    raw: list[int]
    clipped: list[int]


def preference(history: Tensor, tau1: float, tau2: float) -> Preference:
    """Return H, V and P = H^(1/tau1) V^(1/tau2), from modify_llama.py and utils.py.

    Args:
        history: Window attention on the history, [B, H, w, S']. H is taken in fp32, V and its
            power in this dtype (in fp16 the power of a small V is 0).
        tau1: Temperature of H.
        tau2: Temperature of V.

    """
    wide = history.float()
    dispersion = -(wide * (wide + 1e-10).log()).sum()
    shift = history.var(dim=-2).sum(0).sum(0).sum(0)
    product = dispersion ** (1.0 / tau1) * shift ** (1.0 / tau2)
    return Preference(float(dispersion), float(shift), float(product))


def indicator(history: Tensor, gamma: float, kernel: int, num_kv_heads: int) -> Tensor:
    """Return eviction scores [B, N, S'], from modify_llama.py.

    Pooling is per column, so it does not matter that the release drops the window afterwards.

    Args:
        history: Window attention on the history, [B, H, w, S'], in the dtype of the result.
        gamma: Weight of the variance.
        kernel: Width of the pooling, odd.
        num_kv_heads: N.

    """
    scores = history.mean(dim=-2) + gamma * history.var(dim=-2)
    return _pooled_group_mean(scores, kernel, num_kv_heads)


def step_indicator(history: Tensor, kernel: int, num_kv_heads: int) -> Tensor:
    """Return the scores [B, N, S'] of a decode step, from modify_llama.py.

    Args:
        history: Attention of the step's queries, [B, H, m, S'], with tokens in storage order, which
            is the order of the pooling.
        kernel: Width of the pooling, odd.
        num_kv_heads: N.

    """
    return _pooled_group_mean(history.mean(dim=-2), kernel, num_kv_heads)


def _pooled_group_mean(scores: Tensor, kernel: int, num_kv_heads: int) -> Tensor:
    pooled = F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return pooled.view(len(pooled), num_kv_heads, -1, pooled.shape[-1]).mean(dim=2)


def adjust_budgets(shares: Sequence[float], pool: int, history: int) -> list[int]:
    """Return the release's integer fix-up of real shares, from utils.py.

    Shares are truncated and capped; what was above the cap is spread evenly over layers below it,
    then what is missing likewise, or what is too much is taken from layers above 1. It is one pass,
    so a budget may end above the cap.

    Args:
        shares: Of the layers, in tokens.
        pool: Tokens to divide.
        history: The cap, in tokens.

    """
    wanted = [int(share) for share in shares]
    budgets = [min(b, history) for b in wanted]
    excess = sum(wanted) - sum(budgets)
    _spread(budgets, excess, [i for i, b in enumerate(budgets) if b < history])
    missing = pool - sum(budgets)
    if missing > 0:
        _spread(budgets, missing, [i for i, b in enumerate(budgets) if b < history])
    else:
        _spread(budgets, missing, [i for i, b in enumerate(budgets) if b > 1])
    return budgets


def _spread(budgets: list[int], amount: int, layers: list[int]) -> None:
    """Add ``amount`` (of either sign) evenly to ``layers`` of ``budgets``, which is changed."""
    if not layers:
        return
    each, rest = divmod(abs(amount), len(layers))
    sign = 1 if amount >= 0 else -1
    for rank, layer in enumerate(layers):
        budgets[layer] += sign * (each + (rank < rest))


def layer_budgets(preferences: Sequence[float], pool: int, history: int) -> LayerBudgets:
    """Return the budgets of the layers seen so far, from cake_cache.py.

    Args:
        preferences: Their P.
        pool: History tokens to divide.
        history: Most tokens of one layer.

    Raises:
        ValueError: All preferences are zero, where the release stops because of a NaN.

    """
    p = [np.float32(value) for value in preferences]
    total = np.float32(sum(p))
    if not total > 0.0:
        raise ValueError("every layer's preference is zero, its share is undefined")
    raw = adjust_budgets([float(value / total * np.float32(pool)) for value in p], pool, history)
    return LayerBudgets(raw, [min(b, history) for b in raw])

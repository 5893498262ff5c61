"""CAKE's released arithmetic, losses included: the yardstick for faithful mode.

A token is named by its position, and a cache is the list of positions it holds in storage order.
That is all there is to it, because keys are never rotated again after they were cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.methods.released_attention import attend, rows_of, window_attention


class Preference(NamedTuple):
    """H (nats), V and P of one layer, summed over the batch, as the release rounds them."""

    dispersion: float
    shift: float
    preference: float


class LayerBudgets(NamedTuple):
    """Integer budgets of the layers seen: after the fix-up, and clipped to the history."""

    raw: list[int]
    clipped: list[int]


def preference(history: Tensor, tau1: float, tau2: float) -> Preference:
    """H, V and P = H^(1/tau1) V^(1/tau2) from window attention on the history [B, H, w, S'].

    H is taken in fp32, V and its power in the dtype of ``history`` (in fp16 the power of a small V
    is 0). Source: cakekv modify_llama.py and utils.py.
    """
    wide = history.float()
    dispersion = -(wide * (wide + 1e-10).log()).sum()
    shift = history.var(dim=-2).sum(0).sum(0).sum(0)
    product = dispersion ** (1.0 / tau1) * shift ** (1.0 / tau2)
    return Preference(float(dispersion), float(shift), float(product))


def indicator(history: Tensor, gamma: float, kernel: int, num_kv_heads: int) -> Tensor:
    """Eviction scores [B, N, S'] from window attention on the history [B, H, w, S'], same dtype.

    Pooling is per column, so it does not matter that the release drops the window afterwards.
    Source: cakekv modify_llama.py.
    """
    scores = history.mean(dim=-2) + gamma * history.var(dim=-2)
    return _pooled_group_mean(scores, kernel, num_kv_heads)


def step_indicator(history: Tensor, kernel: int, num_kv_heads: int) -> Tensor:
    """Scores [B, N, S'] of a decode step from the attention of its queries [B, H, m, S'].

    ``S'`` is in storage order, and so is the pooling. Source: cakekv modify_llama.py.
    """
    return _pooled_group_mean(history.mean(dim=-2), kernel, num_kv_heads)


def _pooled_group_mean(scores: Tensor, kernel: int, num_kv_heads: int) -> Tensor:
    pooled = F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return pooled.view(len(pooled), num_kv_heads, -1, pooled.shape[-1]).mean(dim=2)


def adjust_budgets(shares: Sequence[float], pool: int, history: int) -> list[int]:
    """The release's integer fix-up of real shares: one pass, may overshoot ``history`` (tokens).

    Shares are truncated and capped; what was above the cap is spread evenly over layers below it,
    then what is missing likewise, or what is too much is taken from layers above 1.
    Source: cakekv utils.py.
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
    """Add ``amount`` (of either sign) evenly to ``layers``, the remainder to the first of them."""
    if not layers:
        return
    each, rest = divmod(abs(amount), len(layers))
    sign = 1 if amount >= 0 else -1
    for rank, layer in enumerate(layers):
        budgets[layer] += sign * (each + (rank < rest))


def layer_budgets(preferences: Sequence[float], pool: int, history: int) -> LayerBudgets:
    """Budgets of the layers seen so far from their P (fp32), in history tokens.

    Raises ValueError if all preferences are zero, as the release does by way of NaN.
    Source: cakekv cake_cache.py.
    """
    p = [np.float32(value) for value in preferences]
    total = np.float32(sum(p))
    if not total > 0.0:
        raise ValueError("every layer's preference is zero, its share is undefined")
    raw = adjust_budgets([float(value / total * np.float32(pool)) for value in p], pool, history)
    return LayerBudgets(raw, [min(b, history) for b in raw])


@dataclass
class CakePrefill:
    """What the released prefill leaves behind. Budgets are history tokens, the window excluded.

    ``scores``: [L, B, N, S'] in the model's dtype. ``stage_*``: int64 [L, L], row m after layer m,
    -1 where nothing is decided. ``kept``: per layer int64 [B, N, n], positions in storage order.
    """

    preferences: list[Preference]
    scores: Tensor
    stage_budget: Tensor
    stage_budget_raw: Tensor
    stage_kept: Tensor
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ReleasedCake:
    """The released pipeline over all layers. ``capacity``: C in tokens, window included."""

    window: int
    capacity: int
    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    kernel: int = 5
    cascading: bool = True

    def prefill(self, queries: Tensor, keys: Tensor) -> CakePrefill:
        """Run all layers. ``queries``: [L, B, H, w, D]; ``keys``: [L, B, N, S, D]; one dtype."""
        layers, batch, heads = keys.shape[:3]
        tokens = keys.shape[3]
        history = tokens - self.window
        base = self.capacity - self.window
        window_ids = torch.arange(history, tokens).expand(batch, heads, -1)
        held: list[Tensor] = []  # history positions of every layer, by descending score
        ranked: list[Tensor] = []  # their scores
        budgets: list[int] = []
        empty = torch.full((layers, layers), -1, dtype=torch.int64)
        result = CakePrefill([], torch.empty(0), empty.clone(), empty.clone(), empty.clone())
        scores = []
        for layer in range(layers):
            attention = window_attention(
                queries[layer], keys[layer], scale=queries.shape[-1] ** -0.5
            )[..., :history]
            result.preferences.append(preference(attention, self.tau1, self.tau2))
            scores.append(indicator(attention, self.gamma, self.kernel, heads))
            held.append(torch.arange(history).expand(batch, heads, -1))
            ranked.append(scores[-1])
            budgets.append(base)
            cut = tokens > self.capacity + self.window
            if cut and (self.cascading or layer == layers - 1):
                p = [seen.preference for seen in result.preferences]
                raw, budgets = layer_budgets(p, base * layers, history)
                result.stage_budget_raw[layer, : layer + 1] = torch.tensor(raw)
                for i, budget in enumerate(budgets):
                    best = ranked[i].topk(min(budget, held[i].shape[-1]), dim=-1)
                    ranked[i] = best.values
                    held[i] = held[i].gather(-1, best.indices)
            result.stage_budget[layer, : layer + 1] = torch.tensor(budgets)
            result.stage_kept[layer, : layer + 1] = torch.tensor([h.shape[-1] for h in held])
        result.scores = torch.stack(scores)
        result.kept = [torch.cat((h, window_ids), dim=-1) for h in held]
        return result

    def decode(
        self, kept: Tensor, budget: int, query: Tensor, keys: Tensor, values: Tensor, token: int
    ) -> tuple[Tensor, Tensor]:
        """One decode step of one layer: (positions kept, attention output fp32 [B, H, D]).

        ``kept``: int64 [B, N, n] before the step. ``query``: [B, H, D]. ``keys``, ``values``:
        [B, N, >= token + 1, D], rows by position. ``token``: position of the new token. The output
        still sees everything; only then is the cache cut back to ``budget`` + window. The single
        query's attention is pooled in storage order, as in the release.
        """
        ids = torch.cat((kept, torch.full_like(kept[..., :1], token)), dim=-1)
        k = rows_of(keys, ids)
        output = attend(query, k, rows_of(values, ids))
        if ids.shape[-1] <= budget + self.window:
            return ids, output
        attention = window_attention(query[:, :, None], k, scale=query.shape[-1] ** -0.5)
        history = attention[..., : ids.shape[-1] - self.window]
        scores = step_indicator(history, self.kernel, k.shape[1])
        best = scores.topk(budget, dim=-1).indices
        return torch.cat((ids.gather(-1, best), ids[..., -self.window :]), dim=-1), output

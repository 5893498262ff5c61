"""The released prefill and decoding of CAKE and DynamicKV, duplicates and losses included.

The yardstick for the faithful modes, which share the arithmetic with it and not the bookkeeping. A
token is named by its position, and a cache is the list of positions it holds in storage order. That
is all there is to it, because keys are never rotated again after they were cached.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vllm_kvcompress.methods.released_attention import window_attention
from vllm_kvcompress.methods.released_cake import (
    Preference,
    indicator,
    layer_budgets,
    preference,
    step_indicator,
)
from vllm_kvcompress.methods.released_dynamickv import layer_budgets as dynamic_budgets
from vllm_kvcompress.methods.released_dynamickv import window_scores


@dataclass
class CakePrefill:
    """What the released prefill leaves behind. Budgets are history tokens, the window excluded.

    Attributes:
        preferences: Per layer.
        scores: [L, B, N, S'] in the model's dtype.
        stage_budget: int64 [L, L], row m after layer m, -1 where nothing is decided.
        stage_budget_raw: The same before it is clipped.
        stage_kept: Tokens held, in the same form.
        kept: Per layer int64 [B, N, n], positions in storage order.

    """

    preferences: list[Preference]
    scores: Tensor
    stage_budget: Tensor
    stage_budget_raw: Tensor
    stage_kept: Tensor
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ReleasedCake:
    """The release over all layers, cut after each of them or, not ``cascading``, after the last."""

    window: int
    capacity: int
    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    kernel: int = 5
    cascading: bool = True

    def prefill(self, queries: Tensor, keys: Tensor) -> CakePrefill:
        """Run all layers, on queries [L, B, H, w, D] and keys [L, B, N, S, D] of one dtype."""
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
        """Run one decode step of one layer.

        The output still sees everything; only then is the cache cut back to ``budget`` + window.
        The single query's attention is pooled in storage order, as in the release.

        Args:
            kept: int64 [B, N, n], positions before the step.
            budget: History tokens.
            query: [B, H, D].
            keys: [B, N, >= token + 1, D], rows by position.
            values: The same.
            token: Position of the new token.

        Returns:
            Positions kept, and the attention output, fp32 [B, H, D].

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


@dataclass
class DynamicPrefill:
    """What the released prefill leaves behind.

    Attributes:
        scores: [L, B, H, S'] in the model's dtype.
        update_budget: One list per update, history tokens of the layers seen.
        update_cache_len: Likewise, tokens held, window included.
        kept: Per layer int64 [B, H, n], positions in storage order, duplicates as they are.

    """

    scores: Tensor
    update_budget: list[list[int]] = field(default_factory=list)
    update_cache_len: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def duplicates(self) -> list[int]:
        """Per layer, the most surplus copies of positions in one head's list."""
        return [
            max(head.numel() - head.unique().numel() for row in layer for head in row)
            for layer in self.kept
        ]


@dataclass(frozen=True)
class ReleasedDynamicKV:
    """The release over all layers; ``capacity`` is in tokens, window included."""

    window: int
    capacity: int
    kernel: int = 7
    pooling: Literal["avg", "max"] = "avg"
    r_max: float = 10.0
    every: int = 4

    def prefill(self, queries: Tensor, keys: Tensor) -> DynamicPrefill:
        """Run all layers, on queries [L, B, H, w, D] and keys [L, B, N, S, D] of one dtype."""
        layers, batch, heads = queries.shape[:3]
        tokens = keys.shape[3]
        history = tokens - self.window
        base = self.capacity - self.window
        first = min(int(self.r_max * base), history)
        window_ids = torch.arange(history, tokens).expand(batch, heads, -1)
        scores: list[Tensor] = []
        result = DynamicPrefill(torch.empty(0))
        kept = result.kept
        for layer in range(layers):
            scores.append(
                window_scores(
                    queries[layer],
                    keys[layer],
                    history=history,
                    kernel=self.kernel,
                    pooling=self.pooling,
                    scale=queries.shape[-1] ** -0.5,
                )
            )
            best = scores[-1].topk(first, dim=-1).indices
            kept.append(torch.cat((best, window_ids), dim=-1))
            if (layer + 1) % self.every == 0:
                budgets = dynamic_budgets(scores, base=base, r_max=self.r_max, num_layers=layers)
                for i, budget in enumerate(budgets):
                    # Where the budget exceeds the rows held, the first slice already reaches into
                    # the window, and the window is then appended once more.
                    head = kept[i][..., : min(budget, history)]
                    kept[i] = torch.cat((head, kept[i][..., -self.window :]), dim=-1)
                result.update_budget.append(budgets)
                result.update_cache_len.append([rows.shape[-1] for rows in kept])
        result.scores = torch.stack(scores)
        return result

    def decode(
        self, kept: Tensor, query: Tensor, keys: Tensor, values: Tensor, token: int
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`ReleasedCake.decode` with positions [B, H, n], but nothing is evicted."""
        ids = torch.cat((kept, torch.full_like(kept[..., :1], token)), dim=-1)
        group = query.shape[1] // keys.shape[1]
        k = rows_of(keys.repeat_interleave(group, dim=1), ids)
        v = rows_of(values.repeat_interleave(group, dim=1), ids)
        return ids, attend(query, k, v)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention output of one decode query per head, fp32 [B, H, D].

    It stands for the flash-attention call of the releases, on which no score depends. Keys and
    values are [B, heads, n, D], with heads dividing H.
    """
    group = queries.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(group, dim=1)
    v = values.float().repeat_interleave(group, dim=1)
    logits = (queries.float()[:, :, None] @ k.transpose(-1, -2)) / math.sqrt(queries.shape[-1])
    return (logits.softmax(dim=-1) @ v)[:, :, 0]


def rows_of(cache: Tensor, ids: Tensor) -> Tensor:
    """Return the rows ``ids``, int64 [B, heads, n], of a cache [B, heads, S, D]."""
    return cache.gather(2, ids[..., None].expand(*ids.shape, cache.shape[-1]))

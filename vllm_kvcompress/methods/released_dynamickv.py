"""DynamicKV's released arithmetic, duplicates and rounding included: faithful mode's yardstick.

As in the CAKE module a cache is the list of positions it holds. The release caches one copy per
query head, so here heads are always H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.methods.released_attention import attend, rows_of, window_attention


def window_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    history: int,
    kernel: int,
    pooling: Literal["avg", "max"],
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Summed and pooled window attention [B, H, S'], in the dtype of the inputs.

    ``queries``: [B, H, m, D]; ``keys``: [B, N, S, D]; ``history``: S', columns that can be evicted.
    Source: DynamicKV dynamic_v11.py.
    """
    attention = window_attention(queries, keys, scale=scale, soft_cap=soft_cap, sinks=sinks)
    total = attention[..., :history].sum(dim=-2)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(total, kernel, stride=1, padding=kernel // 2)


def layer_budgets(
    scores: Sequence[Tensor], *, base: int, r_max: float, num_layers: int
) -> list[int]:
    """The release's budgets, in history tokens, of the layers seen so far.

    ``scores``: [B, H, S'] per layer. Counts of the global top are divided by the number of layers
    and rounded down twice; the last layer seen gets the residue. Returns zeros if no layer has a
    count left after the rounding (the release stops with a division by zero).
    Source: DynamicKV dynamic_v11.py, the periodic update.
    """
    seen = len(scores)
    batch, heads, history = scores[0].shape
    wanted = base * heads * seen
    flat = torch.stack(list(scores)).flatten()
    if wanted > flat.numel():
        winners = [batch * heads * history] * seen
    else:
        layer = flat.topk(wanted).indices // (batch * heads * history)
        winners = torch.bincount(layer, minlength=seen).tolist()
    counts = [won // seen for won in winners]
    if seen == num_layers and sum(counts) != batch * heads * history:
        counts[-1] += wanted // num_layers - sum(counts)
    total = sum(counts)
    if total == 0:
        return [0] * seen
    kept = min(int(r_max * base), history)
    rough = [int(kept * (count / total)) for count in counts]
    if sum(rough) == 0:
        return [0] * seen
    shrink = sum(rough) / (base * num_layers)
    budgets = [int(value // shrink) for value in rough]
    budgets[-1] += base * num_layers - sum(budgets)
    return budgets


@dataclass
class DynamicPrefill:
    """What the released prefill leaves behind.

    ``scores``: [L, B, H, S'] in the model's dtype. ``update_budget``: one list per update, history
    tokens of the layers seen. ``update_cache_len``: likewise, tokens held, window included.
    ``kept``: per layer int64 [B, H, n], positions in storage order, duplicates as they are.
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
    """The released pipeline over all layers. ``capacity``: tokens per layer, window included."""

    window: int
    capacity: int
    kernel: int = 7
    pooling: Literal["avg", "max"] = "avg"
    r_max: float = 10.0
    every: int = 4

    def prefill(self, queries: Tensor, keys: Tensor) -> DynamicPrefill:
        """Run all layers. ``queries``: [L, B, H, w, D]; ``keys``: [L, B, N, S, D]; one dtype."""
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
                budgets = layer_budgets(scores, base=base, r_max=self.r_max, num_layers=layers)
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
        """One decode step of one layer: (positions kept, attention output fp32 [B, H, D]).

        ``kept``: int64 [B, H, n]. ``query``: [B, H, D]. ``keys``, ``values``: [B, N, S + T, D],
        rows by position. Nothing is evicted.
        """
        ids = torch.cat((kept, torch.full_like(kept[..., :1], token)), dim=-1)
        group = query.shape[1] // keys.shape[1]
        k = rows_of(keys.repeat_interleave(group, dim=1), ids)
        v = rows_of(values.repeat_interleave(group, dim=1), ids)
        return ids, attend(query, k, v)

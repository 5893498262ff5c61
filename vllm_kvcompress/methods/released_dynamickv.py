"""DynamicKV's released arithmetic, rounding included, for the faithful mode.

The release caches one copy per query head, so here heads are always H. Source: DynamicKV
dynamic_v11.py.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.methods.released_attention import window_attention


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
    """Return the summed and pooled window attention [B, H, S'], in the dtype of the inputs.

    Args:
        queries: [B, H, m, D].
        keys: [B, N, S, D].
        history: S', columns that can be evicted.
        kernel: Width of the pooling, odd.
        pooling: How neighbouring tokens are pooled.
        scale: As for :func:`window_attention`.
        soft_cap: As for :func:`window_attention`.
        sinks: As for :func:`window_attention`.

    """
    attention = window_attention(queries, keys, scale=scale, soft_cap=soft_cap, sinks=sinks)
    total = attention[..., :history].sum(dim=-2)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(total, kernel, stride=1, padding=kernel // 2)


def layer_budgets(
    scores: Sequence[Tensor], *, base: int, r_max: float, num_layers: int
) -> list[int]:
    """Return the budgets of the layers seen so far, from the periodic update.

    Counts of the global top are divided by the number of layers and rounded down twice; the last
    layer seen gets the residue.

    Args:
        scores: [B, H, S'] per layer; S' differs only at cuts that the release does not make, while
            it generates or between chunks.
        base: History tokens of an average layer.
        r_max: Most history tokens of a layer, in units of ``base``.
        num_layers: Number of all layers.

    Returns:
        History tokens per layer; zeros if no layer has a count left after the rounding, where the
        release stops with a division by zero.

    """
    seen = len(scores)
    heads, history = scores[0].shape[1], max(layer.shape[2] for layer in scores)
    wanted = base * heads * seen
    sizes = torch.tensor([layer.numel() for layer in scores], device=scores[0].device)
    flat = torch.cat([layer.flatten() for layer in scores])
    if wanted > flat.numel():
        winners = sizes.tolist()
    else:
        owner = torch.arange(seen, device=flat.device).repeat_interleave(sizes)
        winners = torch.bincount(owner[flat.topk(wanted).indices], minlength=seen).tolist()
    counts = [won // seen for won in winners]
    if seen == num_layers and sum(counts) != scores[0].numel():
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

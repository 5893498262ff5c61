"""Window attention the way both releases compute it: in the model's dtype, all at once.

Only the faithful modes and the checks against recorded outputs use this. It holds H x m x S
probabilities and rounds them to half precision, which is exactly what the corrected methods avoid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def window_attention(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention [B, H, m, S] of the last m queries, in the dtype of the inputs.

    ``queries``: [B, H, m, D]; ``keys``: [B, N, S, D], same dtype. Logits are rounded to that dtype
    after the product and after the scale, the softmax is fp32 and rounded again. ``soft_cap`` and
    ``sinks`` ([H]) extend this to models the releases do not cover. Nothing is mutated.

    Source: cakekv modify_llama.py and DynamicKV dynamic_v11.py, lines as in the specification.
    """
    batch, heads, count, _ = queries.shape
    tokens = keys.shape[2]
    expanded = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    # Division by 1 / scale: the releases divide by sqrt(D), which rounds differently in fp16.
    logits = (queries @ expanded.transpose(-1, -2)) / (1.0 / scale)
    if soft_cap > 0.0:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    lowest = torch.finfo(logits.dtype).min
    future = torch.full((count, count), lowest, dtype=logits.dtype, device=logits.device).triu(1)
    logits[..., tokens - count :] += future
    if sinks is None:
        return logits.float().softmax(dim=-1).to(queries.dtype)
    extra = sinks.float().view(1, heads, 1, 1).expand(batch, heads, count, 1)
    joined = torch.cat((logits.float(), extra), dim=-1).softmax(dim=-1)
    return joined[..., :tokens].to(queries.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention output [B, H, D] of one decode query per head, in fp32.

    ``queries``: [B, H, D]; ``keys``, ``values``: [B, heads, n, D] with heads dividing H. Stands for
    the flash-attention call of the releases, on which no score depends.
    """
    group = queries.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(group, dim=1)
    v = values.float().repeat_interleave(group, dim=1)
    logits = (queries.float()[:, :, None] @ k.transpose(-1, -2)) / math.sqrt(queries.shape[-1])
    return (logits.softmax(dim=-1) @ v)[:, :, 0]


def rows_of(cache: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [B, heads, n] (int64) of ``cache`` [B, heads, S, D]: [B, heads, n, D]."""
    return cache.gather(2, ids[..., None].expand(*ids.shape, cache.shape[-1]))

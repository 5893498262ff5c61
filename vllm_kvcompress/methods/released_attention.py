"""Window attention the way both releases compute it: in the model's dtype, all at once.

Only the faithful modes use this. It holds H x m x S probabilities and rounds them to half
precision, which is exactly what the corrected methods avoid.
"""

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
    """Return the causal attention [B, H, m, S] of the last m queries, in the dtype of the inputs.

    Logits are rounded to that dtype after the product and after the scale, the softmax is fp32 and
    rounded again. Source: cakekv modify_llama.py and DynamicKV dynamic_v11.py.

    Args:
        queries: [B, H, m, D].
        keys: [B, N, S, D], in the dtype of the queries.
        scale: Factor on their products.
        soft_cap: tanh cap of the logits, 0 if there is none; the releases have none.
        sinks: [H], extra softmax logits, or None; the releases have none.

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

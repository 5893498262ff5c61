"""How one attention layer turns queries and keys into logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionParams:
    """Parameters of one attention layer that scoring needs.

    Attributes:
        scale: Factor of q . k, where k is the cache's number and q the query that attention is
            given: the scales of a quantized cache and of quantized queries are part of it.
        soft_cap: Logit soft cap, 0 for none.
        sinks: Extra logits per query head, fp32 [H], or None; no gradient is asked of them.

    """

    scale: float
    soft_cap: float
    sinks: Tensor | None


def attention_params(layer: Any, cache_dtype: str) -> AttentionParams:
    """Read the parameters of one of vLLM's attention layers.

    Args:
        layer: The layer, its weights loaded.
        cache_dtype: vLLM's name of the cache dtype.

    """
    impl = layer.impl
    scale = float(impl.scale)
    if cache_dtype.startswith("fp8"):
        scale *= float(layer._k_scale_float)
        if layer.query_quant is not None:
            scale *= float(layer._q_scale_float)
    sinks = impl.sinks
    return AttentionParams(
        scale=scale,
        soft_cap=float(impl.logits_soft_cap or 0.0),
        # Models hand them out as a parameter, and some let it require gradients.
        sinks=sinks.detach().to(torch.float32) if sinks is not None else None,
    )

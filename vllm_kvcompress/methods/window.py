"""Statistics of the observation window, shared by the methods that score with it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics, window_statistics
from kvcompress_kernels.selection import token_scores
from vllm_kvcompress.methods.base import LayerInput, Need
from vllm_kvcompress.methods.keys import keys_at_hand

WINDOW_NEEDS = frozenset({Need.WINDOW_QUERIES, Need.KEYS})


def observed(layer: LayerInput, method: str) -> tuple[Tensor, Tensor]:
    """The window's queries [H, m, D] and all keys [N, S, D]; ValueError if one is missing."""
    keys = keys_at_hand(layer)
    if layer.queries is None or keys is None:
        raise ValueError(f"{method}: scoring needs the window's queries and all keys")
    return layer.queries, keys


def observe(
    layer: LayerInput, window: int, method: str, *, last_query_only: bool = False
) -> WindowStatistics:
    """Attention statistics of the last ``window`` queries of a layer on its history, fp32.

    ``last_query_only``: of the very last query, on the same history; where the window is longer
    than that, ``LayerInput.observe`` cannot tell and is not asked. Raises ValueError if queries or
    keys are missing.
    """
    if layer.observe is not None and not (last_query_only and window > 1):
        return layer.observe()
    queries, keys = observed(layer, method)
    return window_statistics(
        queries[:, -1:] if last_query_only else queries,
        keys,
        window=window,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        sinks=layer.sinks,
    )


def window_votes(
    layer: LayerInput,
    window: int,
    method: str,
    *,
    kernel: int,
    pooling: Literal["avg", "max"] = "avg",
    reduce: Literal["mean", "max"] = "mean",
) -> Tensor:
    """SnapKV's scores of the history, fp32 [N, S'].

    Mean attention of the window's queries, pooled along tokens with an odd width ``kernel``, then
    reduced over the query heads of a KV group. Raises ValueError as :func:`observe` does.
    """
    return token_scores(
        observe(layer, window, method).mean,
        None,
        gamma=0.0,
        kernel=kernel,
        mode=pooling,
        num_kv_heads=layer.num_kv_heads,
        reduce=reduce,
    )

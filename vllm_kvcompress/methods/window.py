"""Statistics of the observation window, shared by the methods that score with it."""

from __future__ import annotations

from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics, window_statistics

from .base import LayerInput, Need

WINDOW_NEEDS = frozenset({Need.WINDOW_QUERIES, Need.KEYS})


def observed(layer: LayerInput, method: str) -> tuple[Tensor, Tensor]:
    """The window's queries [H, m, D] and all keys [N, S, D]; ValueError if one is missing."""
    keys = layer.keys
    if keys is None and layer.read_keys is not None:
        keys = layer.read_keys()
    if layer.queries is None or keys is None:
        raise ValueError(f"{method}: scoring needs the window's queries and all keys")
    return layer.queries, keys


def observe(layer: LayerInput, window: int, method: str) -> WindowStatistics:
    """Attention statistics of the last ``window`` queries of a layer on its history, fp32."""
    if layer.observe is not None:
        return layer.observe()
    queries, keys = observed(layer, method)
    return window_statistics(
        queries,
        keys,
        window=window,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        sinks=layer.sinks,
    )

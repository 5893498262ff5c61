"""Numerical kernels of vllm_kvcompress, importable as ``kvcompress_kernels``.

Nothing here knows vLLM, requests or pages: each module is one piece of tensor arithmetic with a
plain torch implementation that is the reference for any accelerated twin beside it.
"""

from .scoring import WindowStatistics, window_statistics
from .selection import group_mean, pool_tokens, top_tokens, winners_per_layer

__all__ = [
    "WindowStatistics",
    "group_mean",
    "pool_tokens",
    "top_tokens",
    "window_statistics",
    "winners_per_layer",
]

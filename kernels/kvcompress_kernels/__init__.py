"""Numerical kernels of vllm_kvcompress, importable as ``kvcompress_kernels``.

Nothing here knows vLLM or requests: each module is one piece of tensor arithmetic. Its torch
implementation serves on the CPU and is the reference for the Triton kernel, which lies in the
module of the same name that ends in ``_triton`` and is imported when a tensor on an accelerator
first needs it. Where the torch implementation is long, it lies in a module that ends in ``_torch``.
"""

from kvcompress_kernels.compaction import copy_pages, move_tokens
from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.page_tables import ArenaTables, StepTables, fill_page_tables
from kvcompress_kernels.scoring import (
    PagedStatistics,
    WindowStatistics,
    paged_window_statistics,
    window_statistics,
)
from kvcompress_kernels.selection import (
    group_mean,
    pool_tokens,
    select_tokens,
    token_scores,
    top_tokens,
    winners_per_layer,
)

__all__ = [
    "ArenaTables",
    "Cost",
    "Implementation",
    "PagedStatistics",
    "StepTables",
    "WindowStatistics",
    "copy_pages",
    "fill_page_tables",
    "group_mean",
    "move_tokens",
    "paged_window_statistics",
    "pool_tokens",
    "select_tokens",
    "token_scores",
    "top_tokens",
    "window_statistics",
    "winners_per_layer",
]

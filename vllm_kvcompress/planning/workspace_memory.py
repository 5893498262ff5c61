"""Memory that compression takes beside the KV-cache pool, so that a worker can set it aside."""

from dataclasses import dataclass

from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.paging.strided_codec import OBSERVED_BYTES
from vllm_kvcompress.planning.request_settings import SettingsResolver

_OPEN_WINDOWS = 32
"""Prompts whose windows are assumed to be collected in one step; more take activation memory."""


@dataclass(frozen=True)
class ModelShape:
    """What the sizes depend on, per worker.

    Attributes:
        layers: L.
        heads: Query heads H.
        kv_heads: N.
        head_size: D.
        itemsize: Bytes of an element outside of the cache.

    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    itemsize: int


def workspace_bytes(
    resolver: SettingsResolver,
    shape: ModelShape,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
) -> tuple[int, int]:
    """Bytes that compression takes on a GPU beside the pool.

    Args:
        resolver: Of the engine.
        shape: Of the worker's part of the model.
        max_num_seqs: Most requests of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_model_len: Tokens of the longest request.

    Returns:
        What is held all the time (page tables, and queries if there is a decode budget), and what
        is held while one prompt of max_model_len tokens is compressed.

    """
    planner = resolver.default_planner
    limits = TableLimits(max_num_seqs, resolver.row_blocks(max_model_len), max_num_batched_tokens)
    staged, queries = 0, 0
    if planner.can_cascade and planner.config.prefill != "full":
        staged = cdiv(min(planner.limits.one_step_tokens, max_model_len), planner.block_size)
    if planner.config.decode_budget is not None:
        queries = query_buffer_bytes(shape, max_num_seqs, resolver.largest_decode_window)
    cut = planner.prompt_cut(max_model_len)
    # A layer can at most be given every page of the arena.
    most = cut.blocks * planner.block_size * shape.layers if cut else 0
    transient = transient_bytes(
        shape,
        max_model_len=max_model_len,
        window=resolver.largest_window,
        most_kept=min(most, max_model_len),
        observed=OBSERVED_BYTES,
    )
    return table_bytes(shape, limits, staged) + queries, transient


def table_bytes(shape: ModelShape, limits: TableLimits, staged_pages: int = 0) -> int:
    """Bytes of the per-layer page tables, lengths and slot mappings, held all the time.

    Args:
        shape: Of the worker's part of the model.
        limits: The largest batch.
        staged_pages: Pages of the longest prompt that is compressed while it runs: the device's
            copy of the arena's tables grows to it.

    """
    entries = limits.rows * (limits.width + 1 + staged_pages)
    return shape.layers * (4 * entries + 8 * limits.tokens)


def query_buffer_bytes(shape: ModelShape, rows: int, queries: int) -> int:
    """Bytes of the queries of generated tokens that wait for a cut, held all the time.

    Args:
        shape: Of the worker's part of the model.
        rows: Most requests at one time.
        queries: That one cut looks at.

    """
    row = shape.layers * shape.heads * shape.head_size * shape.itemsize
    return (rows * queries + 1) * row


def transient_bytes(
    shape: ModelShape, *, max_model_len: int, window: int, most_kept: int, observed: int
) -> int:
    """Bytes held while one prompt of max_model_len tokens is compressed.

    Args:
        shape: Of the worker's part of the model.
        max_model_len: Longest prompt.
        window: Protected tokens, whose queries are collected.
        most_kept: Most tokens that one layer keeps.
        observed: Bytes of statistics that are held at once, before they become scores.

    """
    one_layer = 2 * 4 * shape.heads * max_model_len
    statistics = max(observed, one_layer)
    # Scores of all layers, and the stack of them that selection reads.
    scores = 2 * 4 * shape.layers * shape.kv_heads * max_model_len
    chosen = 3 * 4 * shape.layers * shape.kv_heads * most_kept
    windows = _OPEN_WINDOWS * shape.layers * window * shape.heads * shape.head_size
    return statistics + scores + chosen + windows * shape.itemsize

"""Memory that compression needs outside the KV-cache pool, which a GPU worker must reserve."""

from dataclasses import dataclass

from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.paging.strided_codec import OBSERVED_BYTES, SHARED_BYTES
from vllm_kvcompress.planning.request_settings import SettingsResolver

_OPEN_WINDOWS = 32
"""Number of prompts of one step whose observation windows are reserved for.

The windows of further prompts take memory that vLLM reserved for activations.
"""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the compressed layers, as one worker has them.

    Attributes:
        layers: Number of compressed layers L.
        heads: Number of query heads H.
        kv_heads: Number of KV heads N.
        head_size: Elements of a head D.
        itemsize: Bytes of an element of the model's dtype.

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
    """Return the bytes that compression needs on a GPU outside the pool.

    Args:
        resolver: The engine's resolver of request settings.
        shape: Sizes of the worker's part of the model.
        max_num_seqs: Largest number of requests of one step.
        max_num_batched_tokens: Largest number of tokens of one step.
        max_model_len: Tokens of the longest request.

    Returns:
        Bytes that are always held (page tables, and queries if there is a decode budget), and bytes
        that are held while one prompt of max_model_len tokens is compressed.

    """
    planner = resolver.default_planner
    limits = TableLimits(max_num_seqs, resolver.row_blocks(max_model_len), max_num_batched_tokens)
    staged, queries = 0, 0
    if planner.can_cascade and planner.config.prefill != "full":
        staged = cdiv(min(planner.limits.one_step_tokens, max_model_len), planner.block_size)
    if planner.config.decode_budget is not None:
        query = shape.layers * shape.heads * shape.head_size * shape.itemsize
        # And one for those that nobody needs.
        queries = (max_num_seqs * resolver.largest_decode_window + 1) * query
    cut = planner.prompt_cut(max_model_len)
    # A layer can at most be given every page of the arena.
    most = cut.blocks * planner.block_size * shape.layers if cut else 0
    transient = transient_bytes(
        shape,
        max_model_len=max_model_len,
        window=resolver.largest_window,
        most_kept=min(most, max_model_len),
    )
    return table_bytes(shape, limits, staged) + queries, transient


def table_bytes(shape: ModelShape, limits: TableLimits, staged_pages: int = 0) -> int:
    """Return the bytes of all layers' page tables, lengths and slot mappings, always held.

    Args:
        shape: Sizes of the worker's part of the model.
        limits: The largest batch.
        staged_pages: Pages of the longest prompt with a cascade prefill; the device's copy of the
            arena's tables must have room for them.

    """
    entries = limits.rows * (limits.width + 1 + staged_pages)
    return shape.layers * (4 * entries + 8 * limits.tokens)


def transient_bytes(shape: ModelShape, *, max_model_len: int, window: int, most_kept: int) -> int:
    """Return the bytes held while one prompt of max_model_len tokens is compressed.

    Args:
        shape: Sizes of the worker's part of the model.
        max_model_len: Tokens of the longest prompt.
        window: Tokens of the observation window, whose queries are collected.
        most_kept: Largest number of tokens that one layer keeps.

    """
    one_layer = 2 * 4 * shape.heads * max_model_len
    statistics = max(OBSERVED_BYTES, one_layer)
    # Scores of all layers of the longest prompt and what a method keeps beside them, or scores of
    # several prompts.
    scores = max(SHARED_BYTES, 2 * 4 * shape.layers * shape.kv_heads * max_model_len)
    chosen = 3 * 4 * shape.layers * shape.kv_heads * most_kept
    windows = _OPEN_WINDOWS * shape.layers * window * shape.heads * shape.head_size
    return statistics + scores + chosen + windows * shape.itemsize

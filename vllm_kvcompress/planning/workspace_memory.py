"""Memory that compression needs outside the KV-cache pool, which a GPU worker must reserve."""

from dataclasses import dataclass

from vllm_kvcompress.methods import Method, Need
from vllm_kvcompress.paging.device_page_tables import MIRROR_STEP, aligned
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.paging.strided_codec import OBSERVED_BYTES, SHARED_BYTES
from vllm_kvcompress.planning.request_settings import SettingsResolver

_OPEN_WINDOWS = 32
"""Number of prompts of one step whose observation windows are reserved for.

The windows of further prompts take memory that vLLM reserved for activations.
"""

_ROUNDED_UP = 8
"""Entries by which vLLM makes a row longer at most, for blocks of at least 16 tokens."""


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
    row = resolver.row_blocks(max_model_len)
    limits = TableLimits(max_num_seqs, row + _ROUNDED_UP, max_num_batched_tokens)
    whole = cdiv(max_model_len, planner.block_size)
    # A layer can at most be given every page of the arena; a row of the block table has entries
    # for the prompt, the arena and two more.
    dealt = min(whole, (row - whole - 2) * shape.layers)
    staged, queries = 0, 0
    if planner.can_cascade and planner.config.prefill != "full":
        staged = cdiv(min(planner.limits.one_step_tokens, max_model_len), planner.block_size)
    if planner.config.decode_budget is not None:
        query = shape.layers * shape.heads * shape.head_size * shape.itemsize
        # And one for those that nobody needs.
        queries = (max_num_seqs * resolver.largest_decode_window + 1) * query
    transient = transient_bytes(
        shape,
        max_model_len=max_model_len,
        window=resolver.largest_window,
        most_kept=min(dealt * planner.block_size, max_model_len),
        in_torch=any(map(_attends_in_torch, resolver.possible_methods())),
    )
    return table_bytes(shape, limits, max(staged, dealt)) + queries, transient


def _attends_in_torch(method: Method) -> bool:
    """Whether a method computes the window's attention itself and not in our kernels."""
    return Need.WINDOW_QUERIES in method.needs and not method.uses_window_statistics


def table_bytes(shape: ModelShape, limits: TableLimits, mirrored_pages: int = 0) -> int:
    """Return the bytes of all layers' page tables, lengths and slot mappings, always held.

    Args:
        shape: Sizes of the worker's part of the model.
        limits: The largest batch.
        mirrored_pages: Most pages of a layer in the device's copy of the arena's tables: those that
            it is dealt, or with a cascade prefill those of the longest prompt. 0: no copy.

    """
    most = aligned(limits)
    held = 4 * most.rows * (most.width + 1) + 8 * most.tokens
    if mirrored_pages:
        slots = max(4, 1 << (limits.rows - 1).bit_length())  # the arena doubles them
        pages = cdiv(mirrored_pages, MIRROR_STEP) * MIRROR_STEP
        held += 4 * slots * (pages + 2)
    return shape.layers * held


def transient_bytes(
    shape: ModelShape, *, max_model_len: int, window: int, most_kept: int, in_torch: bool = False
) -> int:
    """Return the bytes held while one prompt of max_model_len tokens is compressed.

    Args:
        shape: Sizes of the worker's part of the model.
        max_model_len: Tokens of the longest prompt.
        window: Tokens of the observation window, whose queries are collected.
        most_kept: Largest number of tokens that one layer keeps.
        in_torch: Whether some method computes the window's attention in torch, as ``faithful``
            ones do: one layer at a time, with its keys repeated for every query head and the
            probabilities of all queries, in fp32 at times.

    """
    one_layer = 2 * 4 * shape.heads * max_model_len
    statistics = max(OBSERVED_BYTES, one_layer)
    if in_torch:
        vectors = (2 * shape.kv_heads + shape.heads) * shape.head_size * shape.itemsize
        attention = shape.heads * window * (2 * shape.itemsize + 8)
        per_head = 2 * 4 * shape.layers * shape.heads  # what dynamickv keeps of every layer
        statistics = max(statistics, max_model_len * (vectors + attention + per_head))
    # Scores of all layers of the longest prompt and what a method keeps beside them, or scores of
    # several prompts.
    scores = max(SHARED_BYTES, 2 * 4 * shape.layers * shape.kv_heads * max_model_len)
    chosen = 3 * 4 * shape.layers * shape.kv_heads * most_kept
    windows = _OPEN_WINDOWS * shape.layers * window * shape.heads * shape.head_size
    return statistics + scores + chosen + windows * shape.itemsize

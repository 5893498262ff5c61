"""FlashAttention's calls on the CPU: what vLLM's FLASH_ATTN backend needs of it, in plain torch.

The kernel exists for GPUs only. The stand-in does what it is documented to do with the tables and
lengths it is given, and more strictly: a schedule that was made ahead of time for other lengths
than those of the call is an error here, where the real kernel would skip or invent keys.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins into vLLM's module, as FlashAttention 3."""
    from vllm.v1.attention.backends import flash_attn as module

    def version(*_: Any, **__: Any) -> int:
        return 3

    for name, stand_in in (
        ("get_flash_attn_version", version),
        ("flash_attn_supports_quant_query_input", lambda: False),
        ("get_scheduler_metadata", schedule),
        ("reshape_and_cache_flash", reshape_and_cache),
        ("_FA4_DENSE_ATTENTION_KERNEL", attention),
    ):
        patch.setattr(module, name, stand_in, raising=False)  # some only exist on a GPU


def schedule(*, cache_seqlens: Tensor, **_: Any) -> Tensor:
    """Stand in for the ahead-of-time schedule: the lengths it holds for."""
    return cache_seqlens.to(torch.int32).clone()


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *_: Any,
) -> None:
    """Write tokens [T, N, D] to caches [pages, size, N, D]; negative slots are padding."""
    size = key_cache.shape[1]
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    for cache, tokens in ((key_cache, key), (value_cache, value)):
        cache[slots // size, slots % size] = tokens[: len(slot_mapping)][real]


def attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    block_table: Tensor,
    scheduler_metadata: Tensor | None,
    **_: Any,
) -> Tensor:
    """Causal paged attention of T queries [T, H, D], row by row."""
    if scheduler_metadata is not None:
        assert torch.equal(scheduler_metadata, seqused_k), "a schedule made for other lengths"
    size, group = k.shape[1], q.shape[1] // k.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, (start, stop) in enumerate(pairwise(starts)):
        length = int(seqused_k[row])
        assert length <= max_seqlen_k
        if start == stop:
            continue
        pages = block_table[row, : -(-length // size)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1).transpose(0, 1)
            for cache in (k, v)
        )
        queries = q[start:stop].transpose(0, 1)
        logits = queries @ keys.transpose(1, 2) * softmax_scale
        own = torch.arange(length - (stop - start), length)
        hidden = torch.arange(length)[None] > own[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:stop] = (weights @ values).transpose(0, 1)
    return out

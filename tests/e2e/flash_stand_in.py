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

    def always(*_: Any, **__: Any) -> bool:
        return True

    for name, stand_in in (
        ("get_flash_attn_version", version),
        ("flash_attn_supports_kv_cache_dtype", always),
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
    cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Write tokens [T, N, D] to caches [pages, size, N, D]; negative slots are padding."""
    size = key_cache.shape[1]
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    for cache, tokens, scale in ((key_cache, key, k_scale), (value_cache, value, v_scale)):
        written = tokens[: len(slot_mapping)][real]
        if cache_dtype.startswith("fp8"):
            written = quantized(written, scale).view(torch.uint8)
        cache[slots // size, slots % size] = written


def quantized(numbers: Tensor, scale: Tensor) -> Tensor:
    """What the scale has to be multiplied with to have the numbers, as float8_e4m3fn."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return (numbers.float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)


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
    q_descale: Tensor | None,
    k_descale: Tensor,
    v_descale: Tensor,
    **_: Any,
) -> Tensor:
    """Causal paged attention of T queries [T, H, D], row by row; scales are [rows, N]."""
    fp8 = k.dtype == torch.float8_e4m3fn
    # The kernel takes three operands of one dtype.
    assert q.dtype == k.dtype or not fp8, "queries that were not quantized for an FP8 cache"
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
            _numbers(cache[pages], scale[row] if fp8 else None)
            .flatten(0, 1)[:length]
            .repeat_interleave(group, dim=1)
            .transpose(0, 1)
            for cache, scale in ((k, k_descale), (v, v_descale))
        )
        of_heads = None
        if fp8:
            assert q_descale is not None
            of_heads = q_descale[row].repeat_interleave(group)
        queries = _numbers(q[start:stop], of_heads).transpose(0, 1)
        logits = queries @ keys.transpose(1, 2) * softmax_scale
        own = torch.arange(length - (stop - start), length)
        hidden = torch.arange(length)[None] > own[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:stop] = (weights @ values).transpose(0, 1)
    return out


def _numbers(operand: Tensor, scale: Tensor | None) -> Tensor:
    """An operand [..., N, D] with its scales [N]; None: it is not quantized."""
    return operand if scale is None else operand.float() * scale[:, None]

"""Read and write tokens of the pages of vLLM's CPU attention.

CPU attention permutes keys (and with AMX values) inside a page; which way depends on dtype and
instruction set. The permutation is not documented, so it is measured: known numbers are written
through vLLM's own operator and read back. Survivors are written through the same operator, which
packs them itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.page_codec import PageCodec

_DIGIT_BASE = 8
"""Digits 0..7 are exact in every cache dtype, FP8 E5M2 included."""


class CpuPageCodec(PageCodec):
    """Tokens in, tokens out, for vLLM's CPU attention cache.

    Args:
        kv_cache: Flat view of the pool, [pages, N, block_size, 2 * D].
        isa: Name of the instruction set that vLLM chose for these layers.
        kv_cache_dtype: vLLM's name of the cache dtype.
        dtype: Dtype of keys and values outside of the cache.

    Raises:
        RuntimeError: The operator does not store a page as a permutation of its tokens.

    """

    def __init__(self, kv_cache: Tensor, isa: str, kv_cache_dtype: str, dtype: torch.dtype) -> None:
        pages, heads, block_size, width = kv_cache.shape
        self._isa = isa
        self._kv_cache_dtype = kv_cache_dtype
        self.block_size = block_size
        self.num_kv_heads = heads
        self.head_size = width // 2
        self.device = kv_cache.device
        self._dtype = dtype
        self._cache = kv_cache.view(pages, heads, 2 * block_size, self.head_size)
        scratch = torch.zeros_like(self._cache[:1])
        self._key_order = self._probe(scratch, part=0)
        self._value_order = self._probe(scratch, part=1)

    def read_keys(self, pages: IntArray, num_tokens: int) -> Tensor:
        heads = self._cache.shape[1]
        ids = torch.as_tensor(pages)
        picked = self._cache[:, :, : self.block_size].index_select(0, ids)
        flat = picked.reshape(len(ids), heads, self.block_size * self.head_size)
        bits = flat.view(_bits(flat.dtype)).index_select(2, self._key_order)
        tokens = bits.view(flat.dtype).view(len(ids), heads, self.block_size, self.head_size)
        tokens = tokens.transpose(0, 1).reshape(heads, -1, self.head_size)[:, :num_tokens]
        return tokens.to(self._dtype)

    def move(
        self, sources: Sequence[IntArray], kept: Sequence[Tensor], targets: Sequence[IntArray]
    ) -> None:
        for source, tokens, target in zip(sources, kept, targets, strict=True):
            self.rewrite(source, tokens, target)

    def rewrite(self, source: IntArray, kept: Tensor, target: IntArray) -> None:
        keys, values = self.gather(torch.as_tensor(source), kept)
        self.write(torch.as_tensor(target), keys, values)

    def gather(self, pages: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of some tokens, each head its own, both [N, T, D].

        Args:
            pages: int64 [n], flat page ids in token order.
            tokens: int64 [N, T], token numbers within those pages.

        """
        return self._gather(pages, tokens, part=0), self._gather(pages, tokens, part=1)

    def write(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages from their first slot on. Mutates just these pages.

        Args:
            pages: int64 [n], flat page ids in token order.
            keys: [N, T, D], T at most n * block_size.
            values: As keys.

        """
        tokens = torch.arange(keys.shape[1])
        slots = pages[tokens // self.block_size] * self.block_size + tokens % self.block_size
        self._store(self._cache, keys.transpose(0, 1), values.transpose(0, 1), slots)

    def copy(self, source: IntArray, target: IntArray) -> None:
        self._cache[torch.as_tensor(target)] = self._cache[torch.as_tensor(source)]

    def _gather(self, pages: Tensor, tokens: Tensor, part: int) -> Tensor:
        order = self._value_order if part else self._key_order
        size = self.block_size * self.head_size
        page_stride, head_stride = self._cache.stride()[:2]
        # Pages need not be neighbours: elements are picked from all that lies between them.
        extent = (self._cache.shape[0] - 1) * page_stride + self._cache[0].numel()
        elements = self._cache.as_strided((extent,), (1,)).view(_bits(self._cache.dtype))
        head = torch.arange(self._cache.shape[1]).unsqueeze(1) * head_stride
        first = pages[tokens // self.block_size] * page_stride + head + part * size
        place = order.view(self.block_size, self.head_size)[tokens % self.block_size]
        picked = elements[first.unsqueeze(-1) + place]
        return picked.view(self._cache.dtype).to(self._dtype)

    def _store(self, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys.contiguous(),
            values.contiguous(),
            key_cache,
            value_cache,
            slots,
            self._isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self._kv_cache_dtype,
        )

    def _probe(self, scratch: Tensor, part: int) -> Tensor:
        """Return int64 [block_size * D]: where each (token, dim) of a page lies."""
        heads, size = scratch.shape[1], self.block_size * self.head_size
        number = torch.arange(size)
        found = torch.zeros(size, dtype=torch.int64)
        weight = 1
        while weight < size:
            digit = (number // weight % _DIGIT_BASE).view(self.block_size, 1, self.head_size)
            tokens = digit.expand(-1, heads, -1).to(self._dtype)
            self._store(scratch, tokens, tokens, torch.arange(self.block_size))
            half = scratch.chunk(2, dim=2)[part][0, 0].reshape(-1)
            found += half.to(torch.float32).round().to(torch.int64) * weight
            weight *= _DIGIT_BASE
        order = torch.full((size,), -1)
        order[found.clamp(0, size - 1)] = number
        if (order < 0).any():
            raise RuntimeError(
                f"cannot read back KV pages written by the CPU attention kernel ({self._isa}); "
                "report this with the CPU model and dtype, and run without --kv-compression"
            )
        return order


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Return the integer type of the same width: not every float type can be gathered."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]

"""Read and write tokens of the pages of vLLM's CPU attention.

CPU attention permutes keys (and with AMX values) inside a page; which way depends on dtype and
instruction set. The permutation is not documented, so it is measured: known numbers are written
through vLLM's own operator and read back. Survivors are written through the same operator, which
packs them itself.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_order import INTEGERS, PageOrder

_DIGIT_BASE = 8
"""Digits 0..7 are exact in every cache dtype, FP8 E5M2 included."""

_BYTES_AT_ONCE = 2 << 20
"""Keys of survivors that are moved together: layers share calls, and caches hold what they move."""


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
        page_step, head_step = self._cache.stride()[:2]
        self._page_step, self._head_steps = page_step, torch.arange(heads) * head_step
        # Pages need not be neighbours: tokens are fetched from all that lies between them.
        extent = (pages - 1) * page_step + self._cache[0].numel()
        self._memory = self._cache.as_strided((extent,), (1,))
        half = block_size * self.head_size
        halves = self._cache.as_strided((pages, heads, 2, half), (page_step, head_step, half, 1))
        self._halves = [_numbers(halves[:, :, part]) for part in (0, 1)]
        scratch = torch.zeros_like(self._cache[:1])
        distance = math.gcd(page_step, head_step, half)
        self._orders = [
            PageOrder(self._probe(scratch, part), distance, scratch.dtype.itemsize)
            for part in (0, 1)
        ]
        plain = torch.arange(half).view(block_size, self.head_size)
        self._held_order = PageOrder(plain, distance, scratch.dtype.itemsize)

    def read_keys(self, pages: IntArray, num_tokens: int) -> Tensor:
        tokens = torch.arange(num_tokens)[:, None].expand(-1, self.num_kv_heads)
        keys = self._fetch(torch.as_tensor(pages), tokens, self._head_steps, part=0)
        return keys.transpose(0, 1).to(self._dtype)

    def move(
        self, sources: Sequence[IntArray], kept: Sequence[Tensor], targets: Sequence[IntArray]
    ) -> None:
        for group in self._groups(kept):
            pages, tokens = self._join(sources[group], kept[group])
            keys, values = (
                self._fetch(pages, tokens.T, self._head_steps, part).to(self._dtype)
                for part in (0, 1)
            )
            self._store(self._cache, keys, values, self._slots(targets[group], kept[group]))

    def rewrite(self, source: IntArray, kept: Tensor, target: IntArray) -> None:
        self.move([source], [kept], [target])  # which has fetched all before it writes any

    def gather(self, pages: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of some tokens, each head its own, both [N, T, D].

        Args:
            pages: int64 [n], flat page ids in token order.
            tokens: int64 [N, T], token numbers within those pages.

        """
        heads = self._head_steps[:, None]
        keys, values = (self._fetch(pages, tokens, heads, part) for part in (0, 1))
        return keys.to(self._dtype), values.to(self._dtype)

    def write(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages from their first slot on. Mutates just these pages.

        Args:
            pages: int64 [n], flat page ids in token order.
            keys: [N, T, D], T at most n * block_size.
            values: As keys.

        """
        slots = self._slots([pages.numpy()], [keys[..., 0]])
        self._store(self._cache, keys.transpose(0, 1), values.transpose(0, 1), slots)

    def copy(self, source: IntArray, target: IntArray) -> None:
        self._cache[torch.as_tensor(target)] = self._cache[torch.as_tensor(source)]

    # --- in a cascade ----------------------------------------------------------------------------

    def hold(
        self,
        source: IntArray,
        kept: Tensor,
        target: IntArray,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        """See the base class; held tokens lie in plain rows, which no operator has to pack."""
        heads, size = self.num_kv_heads, self.block_size
        tokens = kept.to(torch.int64).view(heads, len(target), size).transpose(0, 1)
        pages = torch.as_tensor(source)
        for part, given in enumerate((keys, values)):
            if given is None:
                rows = self._fetch(pages, tokens, self._head_steps[:, None], part)
            else:
                rows = _pick(given.to(self._cache.dtype), tokens)
            # NumPy copies whole pages, where torch copies element by element.
            self._halves[part][target] = _numbers(rows.view(len(target), heads, -1))

    def settle(self, pages: Sequence[IntArray], orders: Sequence[Tensor]) -> None:
        for group in self._groups(orders):
            ids, tokens = self._join(pages[group], orders[group])
            keys, values = (
                self._fetch(ids, tokens.T, self._head_steps, part, held=True).to(self._dtype)
                for part in (0, 1)
            )
            self._store(self._cache, keys, values, self._slots(pages[group], orders[group]))

    # --- parts -----------------------------------------------------------------------------------

    def _groups(self, kept: Sequence[Tensor]) -> Iterator[slice]:
        """Neighbouring layers that are moved together."""
        most = _BYTES_AT_ONCE // (self.num_kv_heads * self.head_size * self._dtype.itemsize)
        first = total = 0
        for layer, tokens in enumerate(kept):
            if layer > first and total + tokens.shape[1] > most:
                yield slice(first, layer)
                first, total = layer, 0
            total += tokens.shape[1]
        yield slice(first, len(kept))

    def _join(self, pages: Sequence[IntArray], kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Page ids [n] and token numbers [N, T] of several layers as if they were one, int64."""
        before = np.cumsum([0, *map(len, pages)]) * self.block_size
        tokens = [t + int(n) for t, n in zip(kept, before, strict=False)]
        return torch.from_numpy(np.concatenate(pages)), torch.cat(tokens, dim=1).to(torch.int64)

    def _slots(self, pages: Sequence[IntArray], kept: Sequence[Tensor]) -> Tensor:
        """The first slots of some layers' pages, as many as each has tokens [N, T], int64 [T]."""
        inside = np.arange(self.block_size)
        slots = [
            (own[:, None] * self.block_size + inside).reshape(-1)[: tokens.shape[1]]
            for own, tokens in zip(pages, kept, strict=True)
        ]
        return torch.from_numpy(np.concatenate(slots))

    def _fetch(
        self, pages: Tensor, tokens: Tensor, heads: Tensor, part: int, *, held: bool = False
    ) -> Tensor:
        """Fetch keys (part 0) or values (part 1) of some tokens.

        Args:
            pages: int64 [n], flat page ids in token order.
            tokens: int64 [...], token numbers within those pages.
            heads: Where each token's head begins in its page, to be broadcast with them.
            part: 0 or 1.
            held: Whether :meth:`hold` has put them there.

        Returns:
            [..., D], contiguous, in the cache's dtype.

        """
        begin = pages[tokens // self.block_size] * self._page_step + heads
        begin += part * self.block_size * self.head_size
        order = self._held_order if held else self._orders[part]
        return order.take(self._memory, begin, tokens % self.block_size)

    def _store(self, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values [T, N, D] through vLLM's operator. Mutates the cache."""
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
        """Return where each token's elements lie in half a page, int64 [block_size, D]."""
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
        return order.view(self.block_size, self.head_size)


def _pick(given: Tensor, tokens: Tensor) -> Tensor:
    """Pick rows of keys or values at hand.

    Args:
        given: [N, S, D], of any strides.
        tokens: Token numbers, int64 [P, N, T].

    Returns:
        [P, N, T, D], contiguous.

    """
    dim = given.shape[2]
    if given.stride(2) != 1 or given.stride(0) % dim or given.stride(1) % dim:
        given = given.contiguous()
    head, token = given.stride(0) // dim, given.stride(1) // dim
    reach = (len(given) - 1) * head + (given.shape[1] - 1) * token + 1
    rows = tokens * token + torch.arange(len(given))[:, None] * head
    found = given.as_strided((reach, dim), (dim, 1)).index_select(0, rows.flatten())
    return found.view(*tokens.shape, dim)


def _numbers(memory: Tensor) -> NDArray[Any]:
    """The same memory in NumPy, as integers: it does not know all types."""
    array: NDArray[Any] = memory.view(INTEGERS[memory.dtype.itemsize]).numpy()
    return array

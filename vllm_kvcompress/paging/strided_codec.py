"""Pages that hold each token's keys and values at one address, as CUDA backends store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress_kernels.compaction import copy_pages, move_tokens, pack_tokens
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.scoring import PagedStatistics, paged_window_statistics
from kvcompress_kernels.selection import select_tokens
from kvcompress_kernels.transfer import Parcel, Sent, upload
from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import JobPages, PageCodec

OBSERVED_BYTES = 256 << 20
"""Bytes of statistics held at one time: layers are scored in groups whose statistics fit."""

SETTLED_BYTES = 64 << 20
"""Bytes of survivors of a cascade that are out of their pages at one time."""

SHARED_BYTES = 256 << 20
"""Bytes of scores held at one time by requests that are cut together."""


@dataclass(frozen=True)
class SentPages(JobPages):
    """Pages whose table goes to the device with the first kernel that reads it.

    Attributes:
        table: int32 [jobs, most pages].
        parcel: What it is in.

    """

    table: Sent
    parcel: Parcel

    def part(self, first: int, stop: int) -> SentPages:
        """Return some neighbouring jobs."""
        return SentPages(
            self.pages[first:stop],
            self.lengths[first:stop],
            self.table.rows(first, stop),
            self.parcel,
        )


class StridedPageCodec(PageCodec):
    """Tokens in, tokens out, for caches [pages, N, block_size, 2 * D] of any strides.

    Args:
        kv_cache: Flat view of the pool; K and V of a token lie side by side in the last dimension.
        cache_dtype: vLLM's name of the cache dtype; ``fp8...`` views bytes as that type.
        dtype: The model's dtype.
        implementation: Kernels that run.

    Raises:
        ValueError: The last dimension is not contiguous.

    """

    shares_launches = True

    def __init__(
        self,
        kv_cache: Tensor,
        cache_dtype: str,
        dtype: torch.dtype,
        implementation: Implementation = "triton",
    ) -> None:
        if kv_cache.stride(-1) != 1:
            raise ValueError("keys and values of a token must be contiguous")
        if cache_dtype.startswith("fp8"):
            fp8 = torch.float8_e5m2 if cache_dtype.endswith("e5m2") else torch.float8_e4m3fn
            kv_cache = kv_cache.view(fp8)
        self._cache = kv_cache
        self._keys = kv_cache[..., : kv_cache.shape[-1] // 2]
        self._dtype = dtype
        self._implementation = implementation
        self.block_size = kv_cache.shape[2]
        self.num_kv_heads = kv_cache.shape[1]
        self.head_size = kv_cache.shape[3] // 2
        self.device = kv_cache.device

    def read_keys(self, pages: IntArray, num_tokens: int) -> Tensor:
        """See the base class; an FP8 cache's numbers come without their scale."""
        picked = self._bytes(self._keys).index_select(0, self._send([pages])[0])
        tokens = picked.view(self._keys.dtype).to(self._dtype).transpose(0, 1)
        return tokens.reshape(self.num_kv_heads, -1, self.head_size)[:, :num_tokens]

    def move(
        self, sources: Sequence[IntArray], kept: Sequence[Tensor], targets: Sequence[IntArray]
    ) -> None:
        counts = [tokens.shape[-1] for tokens in kept]
        # One type: for another the kernel would be compiled anew.
        rows = [tokens.to(self.device, torch.int32) for tokens in kept]
        if len(set(counts)) > 1:
            rows = [pad(own, (0, max(counts) - own.shape[-1])) for own in rows]
        parcel = Parcel(self.device)
        source, target = parcel.add(_table(sources)), parcel.add(_table(targets))
        move_tokens(
            self._cache,
            source,
            torch.stack(rows) if len(rows) > 1 else rows[0][None],
            parcel.add(np.asarray(counts, dtype=np.int32)),
            target,
            implementation=self._implementation,
        )

    def rewrite(self, source: IntArray, kept: Tensor, target: IntArray) -> None:
        """See the base class; survivors of the one layer lie in memory of their own meanwhile."""
        cache, size = self._bytes(self._cache), self.block_size
        tokens = kept.to(self.device, torch.int64)
        heads = torch.arange(len(tokens), device=self.device).unsqueeze(1)
        picked = cache[self._send([source])[0][tokens // size], heads, tokens % size]
        slots = torch.arange(tokens.shape[1], device=self.device)
        cache[self._send([target])[0][slots // size], heads, slots % size] = picked

    def settle(self, pages: Sequence[IntArray], orders: Sequence[Tensor]) -> None:
        """See the base class; several layers at a time as if they were one."""
        token_bytes = self.num_kv_heads * 2 * self.head_size * self._cache.element_size()
        most = max(SETTLED_BYTES // (token_bytes * self.block_size), 1)
        first, size = 0, self.block_size
        while first < len(pages):
            stop, taken = first + 1, len(pages[first])
            while stop < len(pages) and taken + len(pages[stop]) <= most:
                taken, stop = taken + len(pages[stop]), stop + 1
            lengths = [len(own) * size for own in pages[first:stop]]
            before = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
            order = torch.cat([own.to(self.device) for own in orders[first:stop]], dim=1)
            whole = np.concatenate(pages[first:stop])
            self.rewrite(whole, order + upload(torch.from_numpy(before), self.device), whole)
            first = stop

    def copy(self, source: IntArray, target: IntArray) -> None:
        pages = self._send([source, target])
        copy_pages(self._cache, pages[0], pages[1], implementation=self._implementation)

    def open(self, pages: Sequence[IntArray], lengths: Sequence[int]) -> SentPages:
        parcel = Parcel(self.device)
        return SentPages(pages, lengths, parcel.add(_table(pages)), parcel)

    def observe(
        self, windows: Tensor, jobs: JobPages, facts: Sequence[AttentionParams]
    ) -> PagedStatistics:
        assert isinstance(jobs, SentPages)
        sinks = [f.sinks for f in facts if f.sinks is not None]
        return paged_window_statistics(
            windows.transpose(1, 2),
            self._keys,
            jobs.table,
            num_tokens=list(jobs.lengths),
            window=windows.shape[1],
            scale=[f.scale for f in facts],
            soft_cap=facts[0].soft_cap,
            sinks=torch.stack(sinks) if sinks else None,
            parcel=jobs.parcel,
            implementation=self._implementation,
        )

    def keep_best(
        self,
        jobs: JobPages,
        scores: Sequence[Tensor],
        counts: Sequence[int],
        window: Sequence[int],
        targets: Sequence[IntArray | None],
    ) -> list[Tensor]:
        """See the base class; scores on another device are compared there."""
        assert isinstance(jobs, SentPages)
        parcel, total = Parcel(self.device), len(scores)
        held = [count + recent for count, recent in zip(counts, window, strict=True)]
        kept_counts = parcel.add(np.asarray(held, dtype=np.int32))
        homes = [pages for pages in targets if pages is not None]
        moving = len(homes)
        assert all(pages is None for pages in targets[moving:])
        home_table = parcel.add(_table(homes)) if homes else None
        here = all(own.device == self.device for own in scores)
        chosen = select_tokens(
            [own.float() for own in scores],
            counts,
            tails=window,
            parcel=parcel,
            implementation=self._implementation if here else "torch",
        )
        kept = chosen if here else upload(chosen, self.device)
        if home_table is not None:
            move_tokens(
                self._cache,
                jobs.table.rows(0, moving),
                kept[:moving],
                kept_counts.rows(0, moving),
                home_table,
                implementation=self._implementation,
            )
        if moving < total:
            pack_tokens(
                self._cache,
                jobs.table.rows(moving, total),
                kept[moving:],
                kept_counts.rows(moving, total),
                implementation=self._implementation,
            )
        return [own[:, :count] for own, count in zip(kept, held, strict=True)]

    def layers_per_launch(self, num_tokens: int, num_heads: int) -> int:
        return max(1, OBSERVED_BYTES // (2 * 4 * num_heads * num_tokens))

    def warm_up(self) -> None:
        """See the base class; moves no token, and copies the null block's first page to itself."""
        page = self._send([np.zeros(1, dtype=np.int64)])
        nothing = page.new_zeros(1, self.num_kv_heads, 1, dtype=torch.int32)
        move_tokens(self._cache, page, nothing, [0], page, implementation=self._implementation)
        pack_tokens(self._cache, page, nothing, [0], implementation=self._implementation)
        copy_pages(self._cache, page[0], page[0], implementation=self._implementation)

    def _send(self, pages: Sequence[IntArray]) -> Tensor:
        return upload(torch.from_numpy(_table(pages)), self.device)

    def _bytes(self, cache: Tensor) -> Tensor:
        """Return the cache as integers where its type cannot be gathered."""
        return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def _table(pages: Sequence[IntArray]) -> npt.NDArray[np.int32]:
    """Page ids [jobs, most], short rows filled with page 0."""
    table = np.zeros((len(pages), max(len(p) for p in pages)), dtype=np.int32)
    for row, ids in zip(table, pages, strict=True):
        row[: len(ids)] = ids
    return table

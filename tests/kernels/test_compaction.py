"""Moved tokens and copied pages, byte for byte, against loops over jobs, heads and survivors.

The whole storage is filled with random bytes, NaNs with any payload among them, and compared as a
whole: what a kernel writes beyond the slots that are due, or converts on the way, shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels.compaction import (
    as_words,
    compaction_cost,
    copy_pages,
    move_tokens,
    pack_tokens,
)
from kvcompress_kernels.dispatch import Implementation

IMPLEMENTATIONS: list[Implementation] = ["torch", "triton"]
LAYOUTS = ["NHD", "HND", "gaps"]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
]


@dataclass
class Pool:
    """A cache as [P, N, bs, C] and the storage that it is a view of."""

    cache: Tensor
    storage: Tensor

    def raw(self) -> np.ndarray:
        return self.storage.view(torch.uint8).cpu().numpy().copy()

    def raw_cache(self, raw: np.ndarray) -> np.ndarray:
        """[P, N, bs, C * itemsize] view of a copy of the storage's bytes."""
        size = self.cache.element_size()
        *strides, _ = (stride * size for stride in self.cache.stride())
        *shape, width = self.cache.shape
        begin = self.cache.storage_offset() * size
        return np.lib.stride_tricks.as_strided(
            raw[begin:], (*shape, width * size), (*strides, 1), writeable=True
        )


def make_pool(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int, device
) -> Pool:
    """``shape``: (P, N, bs, C). "gaps": rows and pages with room between, the start shifted."""
    pages, heads, size, width = shape
    if layout == "NHD":
        physical, order = (pages, size, heads, width), (0, 2, 1, 3)
    else:
        physical, order = (pages, heads, size, width), (0, 1, 2, 3)
    wide = tuple(n + 1 for n in physical) if layout == "gaps" else physical
    count = math.prod(wide)
    item = dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, count * item, dtype=np.uint8)
    storage = torch.from_numpy(data).to(device).view(dtype)
    view = storage.view(wide)
    if layout == "gaps":
        view = view[1:, 1:, 1:, 1:]
    return Pool(view.permute(order), storage)


@dataclass
class Jobs:
    source: np.ndarray
    tokens: np.ndarray
    counts: list[int]
    target: np.ndarray


def make_jobs(
    pool_pages: int, heads: int, size: int, lengths: list[int], counts: list[int], seed: int
) -> Jobs:
    """Shuffled pages; what counts do not cover is -1, or a page or token far out of range."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(pool_pages).tolist()
    source_width = -(-max(lengths) // size) + 1
    target_width = -(-max(counts) // size) + 1
    jobs = len(lengths)
    source = np.full((jobs, source_width), 10**8)
    target = np.full((jobs, target_width), 10**8)
    tokens = np.full((jobs, heads, max(counts) + 2), -1)
    for job, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for table, tokens_held in ((source, length), (target, count)):
            width = -(-tokens_held // size)
            table[job, :width] = [free.pop() for _ in range(width)]
        for head in range(heads):
            chosen = np.sort(rng.choice(length, count, replace=False))
            tokens[job, head, :count] = chosen
    return Jobs(source, tokens, counts, target)


def expected_bytes(pool: Pool, jobs: Jobs) -> np.ndarray:
    raw = pool.raw()
    view = pool.raw_cache(raw)
    size = view.shape[2]
    for job, count in enumerate(jobs.counts):
        for head in range(view.shape[1]):
            for i in range(count):
                token = jobs.tokens[job, head, i]
                row = view[jobs.source[job, token // size], head, token % size].copy()
                view[jobs.target[job, i // size], head, i % size] = row
    return raw


def check(
    pool: Pool,
    jobs: Jobs,
    implementation: Implementation,
    index=torch.int32,
) -> None:
    expected = expected_bytes(pool, jobs)
    device = pool.cache.device

    def send(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, index)

    move_tokens(
        pool.cache,
        send(jobs.source),
        send(jobs.tokens),
        jobs.counts,
        send(jobs.target),
        implementation=implementation,
    )
    np.testing.assert_array_equal(pool.raw(), expected)


def check_packed(pool: Pool, jobs: Jobs, implementation: Implementation) -> None:
    """Survivors arrive at the front of their own pages, and nothing else changes."""
    before = pool.raw()
    expected, seen = before.copy(), pool.raw_cache(before)
    view, size = pool.raw_cache(expected), seen.shape[2]
    for job, count in enumerate(jobs.counts):
        pages = jobs.source[job]
        for head in range(view.shape[1]):
            for i, token in enumerate(jobs.tokens[job, head, :count]):
                row = seen[pages[token // size], head, token % size]
                view[pages[i // size], head, i % size] = row
    device = pool.cache.device
    pack_tokens(
        pool.cache,
        torch.from_numpy(jobs.source).to(device),
        torch.from_numpy(jobs.tokens).to(device, torch.int32),
        jobs.counts,
        implementation=implementation,
    )
    np.testing.assert_array_equal(pool.raw(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [2 * 128, 2 * 24])
def test_survivors_are_packed_where_they_are(implementation, layout, width, device):
    """More than a tile of them, few of many, all of them, none, and none that has to move."""
    pool = make_pool((120, 2, 16, width), torch.bfloat16, layout, 0, device)
    jobs = make_jobs(120, 2, 16, [300, 400, 40, 50, 90], [270, 33, 40, 0, 64], seed=1)
    jobs.tokens[4, :, :64] = range(64)
    check_packed(pool, jobs, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout(implementation, layout, dtype, device):
    """Beside others a job that keeps everything and one without survivors."""
    pool = make_pool((50, 3, 16, 2 * 24), dtype, layout, 0, device)
    jobs = make_jobs(50, 3, 16, [70, 100, 33, 40], [20, 49, 33, 0], seed=1)
    check(pool, jobs, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_counts_at_page_borders(implementation, size, edge, device):
    """One token below, at and above one and two pages, in jobs that share one launch."""
    counts = [max(size + edge, 1), 2 * size + edge]
    pool = make_pool((16, 2, size, 2 * 16), torch.bfloat16, "NHD", 2, device)
    jobs = make_jobs(16, 2, size, [3 * size + edge, 4 * size], counts, seed=3)
    check(pool, jobs, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [2 * 64, 2 * 80, 2 * 96, 2 * 128, 2 * 256, 2 * 3, 1])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_any_head_size(implementation, width, layout, device):
    pool = make_pool((12, 2, 16, width), torch.float16, layout, 4, device)
    jobs = make_jobs(12, 2, 16, [90], [37], seed=5)
    check(pool, jobs, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_index_types(implementation, index, device):
    pool = make_pool((20, 2, 16, 32), torch.bfloat16, "HND", 6, device)
    jobs = make_jobs(20, 2, 16, [50, 60], [17, 40], seed=7)
    check(pool, jobs, implementation, index)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("jobs", "most"), [(0, 3), (2, 0)])
def test_nothing_to_move(implementation, jobs, most, device):
    pool = make_pool((4, 2, 16, 32), torch.float32, "NHD", 10, device)
    before = pool.raw()
    pages = torch.zeros(jobs, 1, dtype=torch.int32, device=device)
    tokens = torch.zeros(jobs, 2, most, dtype=torch.int32, device=device)
    move_tokens(pool.cache, pages, tokens, [0] * jobs, pages, implementation=implementation)
    np.testing.assert_array_equal(pool.raw(), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_index_tensors_that_are_views(implementation, device):
    """Page tables cut out of wider ones, tokens transposed, every other count."""
    pool = make_pool((20, 3, 16, 32), torch.bfloat16, "NHD", 11, device)
    jobs = make_jobs(20, 3, 16, [50, 60], [17, 40], seed=12)
    expected = expected_bytes(pool, jobs)
    tables = []
    for pages in (jobs.source, jobs.target):
        wide = torch.full((5, pages.shape[1] + 3), -1, device=device)
        wide[1:3, 2 : 2 + pages.shape[1]] = torch.from_numpy(pages).to(device)
        tables.append(wide[1:3, 2 : 2 + pages.shape[1]])
    tokens = torch.from_numpy(jobs.tokens.transpose(2, 1, 0).copy()).to(device).permute(2, 1, 0)
    move_tokens(pool.cache, tables[0], tokens, [17, 40], tables[1], implementation=implementation)
    np.testing.assert_array_equal(pool.raw(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, derandomize=True)
@given(data=st.data())
def test_random_jobs(implementation, device, data):
    size = data.draw(st.sampled_from([16, 32, 48]), "block size")
    heads = data.draw(st.integers(1, 4), "heads")
    width = 2 * data.draw(st.sampled_from([1, 5, 8, 20, 40]), "head size")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    lengths = data.draw(st.lists(st.integers(1, 4 * size), min_size=1, max_size=4), "lengths")
    counts = [data.draw(st.integers(0, length), "count") for length in lengths]
    seed = data.draw(st.integers(0, 99), "seed")
    pool = make_pool((40, heads, size, width), dtype, layout, seed, device)
    check(pool, make_jobs(40, heads, size, lengths, counts, seed), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (9, 2, 16, 2 * 64)),
        (torch.float8_e5m2, (9, 3, 48, 2 * 80)),
        (torch.float16, (9, 1, 16, 6)),
    ],
    ids=str,
)
def test_whole_pages(implementation, layout, dtype, shape, device):
    pool = make_pool(shape, dtype, layout, 13, device)
    source, target = [5, 0, 7], [2, 8, 1]
    expected = pool.raw()
    view = pool.raw_cache(expected)
    view[target] = view[source].copy()
    ids = (torch.tensor(i, dtype=torch.int32, device=device) for i in (source, target))
    copy_pages(pool.cache, *ids, implementation=implementation)
    np.testing.assert_array_equal(pool.raw(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_pages(implementation, device):
    pool = make_pool((3, 2, 16, 8), torch.float16, "NHD", 14, device)
    before = pool.raw()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    copy_pages(pool.cache, none, none, implementation=implementation)
    np.testing.assert_array_equal(pool.raw(), before)


@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "expected"),
    [
        (torch.bfloat16, (2, 2, 16, 256), "NHD", torch.int64),
        (torch.float8_e4m3fn, (2, 2, 16, 160), "HND", torch.int64),
        (torch.float16, (2, 2, 16, 6), "NHD", torch.int32),
        (torch.float16, (2, 2, 16, 5), "NHD", torch.int16),
        (torch.uint8, (2, 2, 16, 5), "HND", torch.uint8),
        (torch.float32, (2, 2, 16, 3), "NHD", torch.int32),
        (torch.bfloat16, (2, 2, 16, 256), "gaps", torch.int16),
    ],
)
def test_words_are_as_wide_as_the_layout_allows(dtype, shape, layout, expected, device):
    pool = make_pool(shape, dtype, layout, 15, device)
    words = as_words(pool.cache)
    assert words.dtype == expected
    assert words.data_ptr() == pool.cache.data_ptr()
    assert words.shape[-1] * expected.itemsize == shape[-1] * dtype.itemsize


def test_an_unaligned_start_narrows_the_words(device):
    pool = make_pool((3, 2, 16, 8), torch.float16, "HND", 16, device)
    assert as_words(pool.cache[:, :, :, 1:5]).dtype == torch.int16


def test_other_sizes_compile_nothing_anew(device, compiled):
    pool = make_pool((80, 2, 16, 2 * 16), torch.bfloat16, "NHD", 17, device)
    for jobs, count in ((1, 1), (2, 16), (1, 17), (3, 33), (16, 2)):
        check(pool, make_jobs(80, 2, 16, [33] * jobs, [count] * jobs, seed=jobs), "triton")
    assert len(compiled) <= 1


def test_a_pool_of_more_than_32_bits(device):
    """Offsets beyond 2^31 words: only worth the memory on a GPU."""
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB free")
    pages = 2**31 // (2 * 16 * 8) + 10  # in words of 8 bytes
    cache = torch.zeros(pages, 2, 16, 32, dtype=torch.bfloat16, device=device)
    last = pages - 1
    cache[last] = torch.randn(2, 16, 32, device=device).bfloat16()
    source, target = (torch.tensor([[p]], device=device) for p in (last, last - 1))
    tokens = torch.tensor([[[3, 9], [0, 15]]], device=device)
    move_tokens(cache, source, tokens, [2], target, implementation="triton")
    for head, chosen in enumerate(([3, 9], [0, 15])):
        assert torch.equal(cache[last - 1, head, :2], cache[last, head, chosen])
    copy_pages(cache, source[0], torch.tensor([0], device=device), implementation="triton")
    assert torch.equal(cache[0], cache[last])
    assert not bool(cache[1 : last - 1].any())


def arguments(device) -> dict[str, Any]:
    return {
        "cache": torch.zeros(8, 2, 16, 32, device=device),
        "source_pages": torch.tensor([[0, 1]], device=device),
        "tokens": torch.zeros(1, 2, 20, dtype=torch.int32, device=device),
        "counts": [20],
        "target_pages": torch.tensor([[2, 3]], device=device),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": torch.zeros(8, 2, 16)}, r"must be \[P, N, block size, C\]"),
        ({"cache": torch.zeros(8, 2, 32, 16).mT}, "stride 16, not 1"),
        ({"cache": torch.zeros(8, 3, 16, 32)}, "2 KV heads for a cache of 3"),
        ({"source_pages": torch.zeros(2, 2, dtype=torch.int32)}, r"source_pages must be \[1,"),
        ({"target_pages": torch.zeros(1, dtype=torch.int32)}, r"target_pages must be \[1,"),
        ({"tokens": torch.zeros(1, 2, 20)}, "tokens must be int32 or int64"),
        ({"counts": [20, 20]}, "2 counts for 1 jobs"),
        ({"counts": [21]}, "21 survivors, but there is room for 0 to 20"),
        ({"counts": [-1]}, "-1 survivors"),
        ({"target_pages": torch.tensor([[2]])}, "room for 0 to 16"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_does_not_fit_is_refused(change, message, implementation, device):
    changed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        move_tokens(**{**arguments(device), **changed}, implementation=implementation)


def test_page_lists_that_do_not_fit_are_refused(device):
    cache = torch.zeros(4, 2, 16, 32, device=device)
    one, two = torch.tensor([0], device=device), torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match=r"must be \[n\] each"):
        copy_pages(cache, one, two)
    with pytest.raises(ValueError, match="target must be int32 or int64"):
        copy_pages(cache, one, one.float())


def test_cost_of_llama_at_1024_tokens_a_layer():
    cost = compaction_cost(32 * 1024, kv_heads=8, head_size=128, itemsize=2)
    assert cost.bytes == 32 * 1024 * 8 * (2 * 512 + 4)
    assert cost.flops == 0

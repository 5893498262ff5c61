"""Moving the tokens that are kept, and whole pages, inside a paged KV cache.

Nothing is computed: bytes are copied as they are, whatever type they stand for. No copy needs a
workspace: survivors go to private pages that are nobody's source, or they are packed in the order
they have within the pages that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton
from kvcompress_kernels.transfer import Sent, on_device

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_INDICES = (torch.int32, torch.int64)


def move_tokens(
    cache: Tensor,
    source_pages: Tensor | Sent,
    tokens: Tensor,
    counts: Sequence[int] | Sent,
    target_pages: Tensor | Sent,
    *,
    implementation: Implementation = "auto",
) -> None:
    """Copy the surviving tokens of R jobs to the front of other pages, one launch for all jobs.

    A job is one layer of one prompt. Mutates the slots of the cache that are written and nothing
    else. Neither version waits for the device.

    The caller makes sure that no target page is a source page of any job or another job's target
    page, that the page ids lie in [0, P), and that the tokens read lie in [0, Ws * bs): none of
    this is checked.

    Args:
        cache: [P, N, bs, C], any dtype, C = 2 * head size with the key of a token in front of its
            value; the last dimension has stride 1, the other strides are free.
        source_pages: int32 or int64 [R, Ws], page ids of each job's prompt in token order.
        tokens: int32 or int64 [R, N, T], positions in that prompt, for each KV head its own; the
            first ``counts[r]`` of each row are read (ascending ones read memory in order), the
            others may hold anything.
        counts: [R], survivors per head; int32 if they are on their way, and not checked then.
        target_pages: int32 or int64 [R, Wt]; survivor i of each head goes to slot i % bs of page
            ``target_pages[r, i // bs]``.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Raises:
        ValueError: Shapes, strides or dtypes do not fit together, or counts do not fit ``tokens``
            and ``target_pages``.

    """
    _check_jobs(cache, tokens, source_pages=source_pages, target_pages=target_pages)
    jobs, _, width = tokens.shape
    most = min(width, target_pages.shape[1] * cache.shape[2])
    _check_counts(counts, jobs, most)
    if jobs == 0 or most == 0:
        return
    words = as_words(cache)
    source, target = on_device(source_pages), on_device(target_pages)
    if use_triton(cache, implementation):
        triton_kernels("compaction").move_tokens(words, source, tokens, counts, target)
    else:
        _move_tokens_torch(words, source, tokens, _numbers(counts), target)


def pack_tokens(
    cache: Tensor,
    pages: Tensor | Sent,
    tokens: Tensor,
    counts: Sequence[int] | Sent,
    *,
    implementation: Implementation = "auto",
) -> None:
    """Move the surviving tokens of R jobs to the front of the pages that hold them, one launch.

    Mutates the first ``counts[r]`` slots of each job and head. Neither version waits for the
    device. What is not checked is as for :func:`move_tokens`, and that survivors ascend: then none
    is overwritten before it has been read.

    Args:
        cache: As for :func:`move_tokens`.
        pages: int32 or int64 [R, W], page ids of each job in token order; no page is in two jobs.
        tokens: As for :func:`move_tokens`, each once, ascending.
        counts: As for :func:`move_tokens`.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Raises:
        ValueError: As for :func:`move_tokens`.

    """
    _check_jobs(cache, tokens, pages=pages)
    jobs, _, width = tokens.shape
    most = min(width, pages.shape[1] * cache.shape[2])
    _check_counts(counts, jobs, most)
    if jobs == 0 or most == 0:
        return
    words, own = as_words(cache), on_device(pages)
    if use_triton(cache, implementation):
        triton_kernels("compaction").pack_tokens(words, own, tokens, counts)
    else:
        _move_tokens_torch(words, own, tokens, _numbers(counts), own)


def copy_pages(
    cache: Tensor, source: Tensor, target: Tensor, *, implementation: Implementation = "auto"
) -> None:
    """Copy whole pages: page ``source[i]`` to page ``target[i]``, one launch for all.

    Mutates the target pages of the cache. The caller makes sure that no target is also a source and
    that targets are distinct: this is not checked.

    Args:
        cache: [P, N, bs, C] as for :func:`move_tokens`.
        source: int32 or int64 [n], page ids in [0, P).
        target: int32 or int64 [n], page ids in [0, P).
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Raises:
        ValueError: Shapes, strides or dtypes do not fit together.

    """
    _check_cache(cache)
    if source.ndim != 1 or source.shape != target.shape:
        raise ValueError(
            f"source and target must be [n] each: {tuple(source.shape)}, {tuple(target.shape)}"
        )
    _check_index("source", source, cache)
    _check_index("target", target, cache)
    if source.numel() == 0:
        return
    words = as_words(cache)
    if use_triton(cache, implementation):
        triton_kernels("compaction").copy_pages(words, source, target)
    else:
        words[target.long()] = words[source.long()]


def compaction_cost(survivors: int, kv_heads: int, head_size: int, itemsize: int) -> Cost:
    """Return the cost of :func:`move_tokens`: keys and values read and written, token numbers read.

    Page ids, at most two per ``bs`` survivors, are left out.

    Args:
        survivors: Sum of ``counts``, per KV head and over all jobs.
        kv_heads: Number of KV heads.
        head_size: Elements of a key.
        itemsize: Bytes of a cache element.

    """
    per_token = 2 * 2 * head_size * itemsize + 4  # and an int32 token number
    return Cost(bytes=survivors * kv_heads * per_token, flops=0)


def as_words(cache: Tensor) -> Tensor:
    """View a cache as the widest integers that its rows, strides and address allow.

    Args:
        cache: [P, N, bs, C], any dtype, with stride 1 in the last dimension.

    Returns:
        [P, N, bs, C'] of int64, int32, int16 or uint8 in the same memory.

    Raises:
        ValueError: Elements are of a size that no such integer has.

    """
    size = cache.element_size()
    offsets = [cache.data_ptr(), cache.shape[-1] * size, *(s * size for s in cache.stride()[:-1])]
    for dtype in _WORDS:
        if dtype.itemsize >= size and all(offset % dtype.itemsize == 0 for offset in offsets):
            return cache.view(dtype)
    raise ValueError(f"elements of {size} bytes ({cache.dtype}) cannot be moved")


def _check_jobs(cache: Tensor, tokens: Tensor, **tables: Tensor | Sent) -> None:
    _check_cache(cache)
    jobs, heads, _ = tokens.shape
    if heads != cache.shape[1]:
        raise ValueError(f"tokens of {heads} KV heads for a cache of {cache.shape[1]}")
    for name, pages in tables.items():
        if len(pages.shape) != 2 or pages.shape[0] != jobs:
            raise ValueError(f"{name} must be [{jobs}, pages], got {tuple(pages.shape)}")
        if isinstance(pages, Tensor):
            _check_index(name, pages, cache)
    _check_index("tokens", tokens, cache)


def _check_counts(counts: Sequence[int] | Sent, jobs: int, most: int) -> None:
    if isinstance(counts, Sent):
        return
    if len(counts) != jobs:
        raise ValueError(f"{len(counts)} counts for {jobs} jobs")
    for job, count in enumerate(counts):
        if not 0 <= count <= most:
            raise ValueError(f"job {job}: {count} survivors, but there is room for 0 to {most}")


def _numbers(counts: Sequence[int] | Sent) -> Sequence[int]:
    if isinstance(counts, Sent):
        found: list[int] = counts.on_device().tolist()
        return found
    return counts


def _check_cache(cache: Tensor) -> None:
    if cache.ndim != 4:
        raise ValueError(f"the cache must be [P, N, block size, C], got {tuple(cache.shape)}")
    if cache.stride(-1) != 1:
        raise ValueError(f"the cache's last dimension has stride {cache.stride(-1)}, not 1")


def _check_index(name: str, index: Tensor, cache: Tensor) -> None:
    if index.dtype not in _INDICES:
        raise ValueError(f"{name} must be int32 or int64, got {index.dtype}")
    if index.device != cache.device:
        raise ValueError(f"{name} is on {index.device}, the cache on {cache.device}")


def _move_tokens_torch(
    words: Tensor,
    source_pages: Tensor,
    tokens: Tensor,
    counts: Sequence[int],
    target_pages: Tensor,
) -> None:
    size = words.shape[2]
    head = torch.arange(words.shape[1], device=words.device)[:, None]
    for job, count in enumerate(counts):
        token = tokens[job, :, :count].long()
        slot = torch.arange(count, device=words.device)
        source = source_pages[job].long()[token // size]
        target = target_pages[job].long()[slot // size]
        words[target[None, :], head, (slot % size)[None, :]] = words[source, head, token % size]

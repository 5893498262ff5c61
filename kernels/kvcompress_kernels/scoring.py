"""What the last queries of a prompt attend to: the statistics that window-based methods use.

CAKE needs the mean and the variance over the window's queries and two scalars of the layer;
DynamicKV and SnapKV need the mean (their window *sum* is the mean times the number of queries). All
of it follows from two passes over the attention probabilities, which are never held for more than
one KV head at a time. ``window_statistics`` takes the keys of one layer as a tensor,
``paged_window_statistics`` reads them from the pages of a KV cache, several layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton
from kvcompress_kernels.scoring_torch import gather_keys, sweep
from kvcompress_kernels.transfer import Parcel, Sent, on_device, upload


@dataclass(frozen=True)
class WindowStatistics:
    """Attention of the window's queries on the history, one layer of one request.

    Probabilities are normalised over *all* visible tokens, window included, and not again over the
    history. The two scalars are numbers, or fp64 tensors of no dimension where they are still on a
    device (:meth:`PagedStatistics.job`): turning one into a number waits for the device.

    Attributes:
        mean: fp32 [H, S'], mean over the queries of the attention probability of each token.
        var: fp32 [H, S'], unbiased variance over the queries (all zero if there is only one).
        entropy: CAKE's dispersion H in nats, -sum p ln p over heads, queries and history columns.
        shift: CAKE's temporal shift V, the sum of ``var``.

    """

    mean: Tensor
    var: Tensor
    entropy: float | Tensor
    shift: float | Tensor


@dataclass(frozen=True)
class PagedStatistics:
    """Window statistics of several jobs; a job is one layer of one request.

    Attributes:
        mean: fp32 [R, H, S'max], as in :class:`WindowStatistics`; S'max is the longest history,
            columns beyond a job's own hold anything. Mean times count is the window sum.
        var: fp32 [R, H, S'max], likewise.
        entropy: fp64 [R], on the device of ``mean``.
        shift: fp64 [R], on the device of ``mean``.
        history: The jobs' own numbers of columns S', on the host.
        lengths: The same on the device, int32 [R].

    """

    mean: Tensor
    var: Tensor
    entropy: Tensor
    shift: Tensor
    history: tuple[int, ...]
    lengths: Tensor

    def job(self, index: int) -> WindowStatistics:
        """Return one job as views, cut to its own history; the scalars stay on the device."""
        columns = self.history[index]
        return WindowStatistics(
            mean=self.mean[index, :, :columns],
            var=self.var[index, :, :columns],
            entropy=self.entropy[index],
            shift=self.shift[index],
        )


def window_statistics(
    queries: Tensor,
    keys: Tensor,
    *,
    window: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> WindowStatistics:
    """Return statistics of the last queries' causal attention over the tokens before the window.

    All arithmetic is fp32; the two scalars are accumulated in fp64 and returned as numbers (on a
    GPU: one synchronisation). Nothing is mutated.

    Source: CAKE's dispersion, shift and indicator (arXiv 2503.12491); the released cakekv
    modify_llama.py takes the same sums in the model's dtype.

    Args:
        queries: [H, m, D], any float dtype, the last m of the prompt's queries, after RoPE; 1 <= m
            <= window, and m is below ``window`` only if the caller does not have more.
        keys: [N, S, D], any float dtype and strides, every key of the prompt after RoPE; query head
            h reads KV head h // (H / N).
        window: Protected tokens at the end; the history is the first S' = S - window.
        scale: Factor on the dot products (usually D ** -0.5).
        soft_cap: If above 0, logits become soft_cap * tanh(logit / soft_cap).
        sinks: [H], one extra logit per query head that takes part in the softmax denominator and in
            nothing else.

    Raises:
        ValueError: Shapes do not fit together, or no token lies before the window.

    """
    heads, count, dim = queries.shape
    kv_heads, tokens, key_dim = keys.shape
    _check_heads(heads, dim, kv_heads, key_dim)
    _check_lengths(count, tokens, window)
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    history = tokens - window
    mean = torch.empty(heads, history, dtype=torch.float32, device=keys.device)
    var = torch.empty_like(mean)
    entropy, shift = sweep(queries, keys, scale, soft_cap, sinks, mean, var)
    both = torch.stack((entropy, shift)).tolist()  # one device synchronisation, not two
    return WindowStatistics(mean=mean, var=var, entropy=both[0], shift=both[1])


def paged_window_statistics(
    queries: Tensor,
    key_cache: Tensor,
    page_table: Tensor | Sent,
    *,
    num_tokens: Sequence[int],
    window: int,
    scale: float | Sequence[float],
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    parcel: Parcel | None = None,
    implementation: Implementation = "auto",
) -> PagedStatistics:
    """Return :func:`window_statistics` of R jobs whose keys lie in the pages of a KV cache.

    A job is one layer of one request; layers of one prompt are separate jobs, each with its pages
    and its scale. Arithmetic is fp32; products that run on tensor cores have exact operands (FP8
    keys as the queries' type, other types that differ as fp32). Equal calls on one device give
    equal bits, and a job's ``mean`` and ``var`` do not depend on the jobs beside it.
    Nothing is mutated. The Triton version does not wait for the device; the torch version gathers
    the keys of one job at a time.

    Source: as for :func:`window_statistics`.

    Args:
        queries: [R, H, m, D], fp32, fp16 or bf16, last dimension contiguous, the last m queries of
            each prompt in order; 1 <= m <= window.
        key_cache: [P, N, block_size, D], any strides with a contiguous last dimension, fp32, fp16,
            bf16 or FP8 (e4m3fn, e5m2).
        page_table: int32 or int64 [R, W], flat page ids in token order; entries past the job's last
            token are not read. It may be on its way in ``parcel``.
        num_tokens: S_r, prompt tokens of each job, above ``window``.
        window: As for :func:`window_statistics`.
        scale: Positive, one number or one per job (for an FP8 cache it includes the key scale).
        soft_cap: As for :func:`window_statistics`.
        sinks: [R, H] or None.
        parcel: Lengths and scales are sent with what waits in it.
        implementation: See :data:`~kvcompress_kernels.dispatch.Implementation`.

    Raises:
        ValueError: Shapes, types or lengths do not fit together.

    """
    jobs, heads, rows, dim = queries.shape
    _, kv_heads, page, key_dim = key_cache.shape
    _check_heads(heads, dim, kv_heads, key_dim)
    scales = [float(s) for s in scale] if isinstance(scale, Sequence) else [float(scale)] * jobs
    given = (len(num_tokens), len(scales), page_table.shape[0])
    if jobs < 1 or set(given) != {jobs}:
        raise ValueError(f"{jobs} jobs, but lengths, scales and page rows are {given}")
    _check_lengths(rows, min(num_tokens), window)
    most, room = max(num_tokens), page_table.shape[1] * page
    for wrong, message in (
        (most > room, f"{page_table.shape[1]} pages do not hold {most} tokens"),
        (min(scales) <= 0.0, f"scales must be positive: {scales}"),
        (sinks is not None and tuple(sinks.shape) != (jobs, heads), "sinks must be [jobs, heads]"),
        (queries.stride(-1) != 1 or key_cache.stride(-1) != 1, "the last stride must be 1"),
        (not key_cache.is_floating_point(), f"keys must be floats, got {key_cache.dtype}"),
    ):
        if wrong:
            raise ValueError(message)
    if isinstance(page_table, Tensor) and page_table.is_floating_point():
        raise ValueError(f"page ids must be integers: {page_table.dtype}")

    history = tuple(tokens - window for tokens in num_tokens)
    mean, var = (
        torch.empty((jobs, heads, max(history)), dtype=torch.float32, device=key_cache.device)
        for _ in range(2)
    )
    if use_triton(key_cache, implementation):
        entropy, shift, lengths = triton_kernels("scoring").paged_window_statistics(
            queries, key_cache, page_table, num_tokens, history, scales, soft_cap, sinks, mean, var,
            parcel,
        )  # fmt: skip
        return PagedStatistics(mean, var, entropy, shift, history, lengths)
    page_table = on_device(page_table)
    lengths = upload(torch.tensor(history, dtype=torch.int32), key_cache.device)
    scalars = []
    for r, (tokens, before) in enumerate(zip(num_tokens, history, strict=True)):
        keys = gather_keys(key_cache, page_table[r, : -(-tokens // page)])[:, :tokens]
        sink = None if sinks is None else sinks[r]
        out = mean[r, :, :before], var[r, :, :before]
        scalars.append(sweep(queries[r], keys, scales[r], soft_cap, sink, *out))
    entropy, shift = (torch.stack(values) for values in zip(*scalars, strict=True))
    return PagedStatistics(mean, var, entropy, shift, history, lengths)


def scoring_cost(
    num_tokens: int, heads: int, kv_heads: int, head_size: int, window: int, itemsize: int
) -> Cost:
    """Return the least work of one job.

    The keys are read twice (a probability cannot be known before the sum of its row is), the
    queries once; the fp32 mean and variance are written. The operations are those of the dot
    products, in both passes.

    Args:
        num_tokens: Tokens of the prompt.
        heads: Query heads.
        kv_heads: KV heads.
        head_size: Elements of a key.
        window: Queries.
        itemsize: Bytes of an element of keys and queries.

    """
    keys = num_tokens * kv_heads * head_size * itemsize
    queries = heads * window * head_size * itemsize
    results = 2 * 4 * heads * (num_tokens - window)
    return Cost(
        bytes=2 * keys + queries + results,
        flops=2 * 2 * heads * window * num_tokens * head_size,
    )


def _check_heads(heads: int, dim: int, kv_heads: int, key_dim: int) -> None:
    if dim != key_dim:
        raise ValueError(f"queries have head size {dim} but keys have {key_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot be shared by {kv_heads} KV heads")


def _check_lengths(count: int, tokens: int, window: int) -> None:
    if not 1 <= count <= window:
        raise ValueError(f"queries must be 1 to window = {window} rows, got {count}")
    if window >= tokens:
        raise ValueError(f"no token lies before the window: {tokens} tokens, window {window}")

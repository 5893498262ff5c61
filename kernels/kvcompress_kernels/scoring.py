"""What the last queries of a prompt look at: the statistics window-based methods are built on.

CAKE needs the mean and the variance over the window's queries and two scalars of the layer,
DynamicKV and SnapKV need the mean (their window *sum* is the mean times the number of queries).
All of it falls out of two sweeps over the attention probabilities, which are never held for more
than one KV head at a time. ``window_statistics`` takes the keys of one layer as a tensor,
``paged_window_statistics`` reads them from the pages of a KV cache, several layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation, triton_kernels, use_triton

# Columns handled at once. On the CPU this many for every _ROWS_CPU rows and thread, so that the
# working set of a block (two fp32 arrays of rows x columns) stays in the L2 caches of the cores.
# Fewer rows at once would keep all blocks there, but make the products slower than that saves.
_BLOCK_CPU = 512
_ROWS_CPU = 256
_BLOCK_GPU = 16384
# Exponentials of one KV head are kept between the two sweeps up to this many elements (fp32);
# beyond it the second sweep computes them again, so that memory does not grow with the prompt.
_KEEP_LOGITS = 1 << 24
_LOWEST = torch.finfo(torch.float32).min
# exp of less than this is 0 here. A little further down fp32 runs out of normal numbers, and on a
# CPU exponentials and products of the others take 10 to 200 times as long.
_FAR_BELOW = -87.0
_EXP_FAR_BELOW = 1.7e-38  # just above exp(_FAR_BELOW)
# Factor on probabilities that keeps their squares from running out of normal numbers; the sum of
# the squares of any window still fits below the largest one.
_LIFT = 2.0**56


@dataclass(frozen=True)
class WindowStatistics:
    """Attention of the window's queries on the history, one layer of one request.

    ``mean``: fp32 [H, S'], mean over the queries of the attention probability of each token.
    ``var``: fp32 [H, S'], unbiased variance over the queries (all zero if there is only one).
    ``entropy``: CAKE's dispersion H in nats, -sum p ln p over heads, queries and history columns.
    ``shift``: CAKE's temporal shift V, the sum of ``var``.

    The two scalars are numbers, or fp64 tensors of no dimension where they are still on a device
    (:meth:`PagedStatistics.job`): turning one into a number waits for the device.

    Probabilities are normalised over *all* visible tokens, window included, and not again over
    the history.
    """

    mean: Tensor
    var: Tensor
    entropy: float | Tensor
    shift: float | Tensor


@dataclass(frozen=True)
class PagedStatistics:
    """Window statistics of several jobs; a job is one layer of one request.

    ``mean``, ``var``: fp32 [R, H, S'max], as in :class:`WindowStatistics`; S'max is the longest
    history, columns beyond a job's own are 0. Mean times count is the window sum.
    ``entropy``, ``shift``: fp64 [R], on the device of ``mean``.
    ``last``: fp32 [R, H, S'max], the probability row of each job's last query, or None.
    ``history``: the jobs' own numbers of columns S', on the host.
    """

    mean: Tensor
    var: Tensor
    entropy: Tensor
    shift: Tensor
    last: Tensor | None
    history: tuple[int, ...]

    def job(self, index: int) -> WindowStatistics:
        """Statistics of one job as views, cut to its own history; scalars stay on the device."""
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
    """Statistics of the causal attention of the last queries over the tokens before the window.

    ``queries``: [H, m, D], any float dtype, the last m of the prompt's queries, after RoPE
    (1 <= m <= window; m is below ``window`` only if the caller does not have more).
    ``keys``: [N, S, D], any float dtype and strides, every key of the prompt after RoPE; query
    head h reads KV head h // (H / N). ``window``: protected tokens at the end; the history is the
    first S' = S - window. ``scale``: factor on the dot products (usually D ** -0.5). ``soft_cap``:
    if above 0, logits become soft_cap * tanh(logit / soft_cap). ``sinks``: [H], one extra logit
    per query head that takes part in the softmax denominator and nothing else.

    All arithmetic is fp32, the two scalars are accumulated in fp64 and returned as numbers (on a
    GPU: one synchronisation). Nothing is mutated. Raises ValueError if shapes do not fit together
    or nothing lies before the window.

    Source: CAKE's dispersion, shift and indicator (arXiv 2503.12491); the released cakekv
    modify_llama.py takes the same sums in the model's dtype.
    """
    heads, count, dim = queries.shape
    kv_heads, tokens, key_dim = keys.shape
    _check_heads(heads, dim, kv_heads, key_dim)
    _check_lengths(count, tokens, window)
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    history = tokens - window
    mean = torch.empty(heads, history, dtype=torch.float32, device=keys.device)
    out = _Out(mean, torch.empty_like(mean), None)
    entropy, shift = _sweep(queries, keys, scale, soft_cap, sinks, out)
    both = torch.stack((entropy, shift)).tolist()  # one device synchronisation, not two
    return WindowStatistics(mean=out.mean, var=out.var, entropy=both[0], shift=both[1])


def paged_window_statistics(
    queries: Tensor,
    key_cache: Tensor,
    page_table: Tensor,
    *,
    num_tokens: Sequence[int],
    counts: Sequence[int] | None = None,
    window: int,
    scale: float | Sequence[float],
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    last: bool = False,
    implementation: Implementation = "auto",
) -> PagedStatistics:
    """:func:`window_statistics` of R jobs whose keys lie in the pages of a KV cache.

    A job is one layer of one request; layers of one prompt are jobs of their own, each with its
    pages and its scale. ``queries``: [R, H, w, D], fp32, fp16 or bf16, last dimension contiguous;
    the first counts[r] rows of job r (all w without ``counts``) are the last queries of its prompt
    in order, the others are not read. 1 <= counts[r] <= window. ``key_cache``: [P, N, block_size,
    D], any strides with a contiguous last dimension, fp32, fp16, bf16 or FP8 (e4m3fn, e5m2).
    ``page_table``: int32 or int64 [R, W], flat page ids in token order; entries past the job's
    last token are not read. ``num_tokens``: S_r, prompt tokens of each job, above ``window``.
    ``scale``: positive, one number or one per job (an FP8 cache has its key scale in here).
    ``soft_cap`` as above; ``sinks``: [R, H] or None. ``last``: also return the last query's row.

    Arithmetic is fp32; products that run on tensor cores have exact operands (FP8 keys as the
    queries' type, other types that differ as fp32). Equal calls on one device give equal bits, and
    a job's ``mean``, ``var`` and ``last`` do not depend on the jobs beside it. Nothing is mutated.
    The Triton version does not wait for the device; the torch version gathers the keys of one job
    at a time. Raises ValueError if shapes, types or lengths do not fit together.

    Source: as for :func:`window_statistics`.
    """
    jobs, heads, rows, dim = queries.shape
    _, kv_heads, page, key_dim = key_cache.shape
    _check_heads(heads, dim, kv_heads, key_dim)
    each = list(counts) if counts is not None else [rows] * jobs
    scales = [float(s) for s in scale] if isinstance(scale, Sequence) else [float(scale)] * jobs
    given = (len(num_tokens), len(each), len(scales), page_table.shape[0])
    if jobs < 1 or set(given) != {jobs}:
        raise ValueError(f"{jobs} jobs, but lengths, counts, scales and page rows are {given}")
    for count, tokens in zip(each, num_tokens, strict=True):
        _check_lengths(count, tokens, window)
    most, room = max(num_tokens), page_table.shape[1] * page
    for wrong, message in (
        (max(each) > rows, f"{max(each)} queries are asked for but there are {rows} rows"),
        (most > room, f"{page_table.shape[1]} pages do not hold {most} tokens"),
        (min(scales) <= 0.0, f"scales must be positive: {scales}"),
        (sinks is not None and tuple(sinks.shape) != (jobs, heads), "sinks must be [jobs, heads]"),
        (queries.stride(-1) != 1 or key_cache.stride(-1) != 1, "the last stride must be 1"),
        (not key_cache.is_floating_point(), f"keys must be floats, got {key_cache.dtype}"),
        (page_table.is_floating_point(), f"page ids must be integers: {page_table.dtype}"),
    ):
        if wrong:
            raise ValueError(message)

    history = tuple(tokens - window for tokens in num_tokens)
    # A job's own columns get written; where all have equally many, nothing needs to be cleared.
    make = torch.zeros if min(history) < max(history) else torch.empty
    mean, var, *rest = (
        make((jobs, heads, max(history)), dtype=torch.float32, device=key_cache.device)
        for _ in range(3 if last else 2)
    )
    row = rest[0] if last else None
    if use_triton(key_cache, implementation):
        entropy, shift = triton_kernels("scoring").paged_window_statistics(
            queries, key_cache, page_table, num_tokens, each, history, scales, soft_cap, sinks,
            mean, var, row,
        )  # fmt: skip
        return PagedStatistics(mean, var, entropy, shift, row, history)
    scalars = []
    for r, (tokens, before) in enumerate(zip(num_tokens, history, strict=True)):
        keys = _gather(key_cache, page_table[r, : -(-tokens // page)])[:, :tokens]
        tail = None if row is None else row[r, :, :before]
        out = _Out(mean[r, :, :before], var[r, :, :before], tail)
        sink = None if sinks is None else sinks[r]
        scalars.append(_sweep(queries[r, :, : each[r]], keys, scales[r], soft_cap, sink, out))
    entropy, shift = (torch.stack(values) for values in zip(*scalars, strict=True))
    return PagedStatistics(mean, var, entropy, shift, row, history)


def scoring_cost(
    num_tokens: int, heads: int, kv_heads: int, head_size: int, window: int, itemsize: int
) -> Cost:
    """Least work of one job with ``window`` queries and keys of ``itemsize`` bytes.

    Two reads of the keys (a probability cannot be known before its row's sum is), one of the
    queries, and the fp32 mean and variance. ``flops`` are those of the dot products, taken in both
    passes.
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


def _gather(key_cache: Tensor, pages: Tensor) -> Tensor:
    """Keys of some pages as [N, pages * block_size, D]."""
    dtype = key_cache.dtype
    tokens_first = key_cache.transpose(1, 2)
    if dtype.itemsize == 1:  # indexing knows no FP8; bytes it does
        taken = tokens_first.view(torch.uint8)[pages].view(dtype).float()
    else:
        taken = tokens_first[pages]
    return taken.flatten(0, 1).transpose(0, 1)


@dataclass(frozen=True)
class _Out:
    """Where the results of one layer go: fp32 [H, S'] each, ``last`` if it is wanted."""

    mean: Tensor
    var: Tensor
    last: Tensor | None


def _sweep(
    queries: Tensor, keys: Tensor, scale: float, soft_cap: float, sinks: Tensor | None, out: _Out
) -> tuple[Tensor, Tensor]:
    """Fill ``out``; return entropy and shift as fp64 tensors of no dimension."""
    heads, count, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = heads // kv_heads
    blocks = _Blocks(group, count, tokens, out.mean.shape[1], soft_cap, keys)
    entropy = torch.zeros((), dtype=torch.float64, device=keys.device)
    for n in range(kv_heads):
        rows = slice(n * group, (n + 1) * group)
        q = queries[rows].flatten(0, 1).float() * scale
        sink = None if sinks is None else sinks[rows].float().repeat_interleave(count)
        entropy += blocks.first(q, keys[n], sink)
        last = None if out.last is None else out.last[rows]
        blocks.second(q, keys[n], _Out(out.mean[rows], out.var[rows], last))
    return entropy, out.var.sum(dtype=torch.float64)


class _Blocks:
    """Both sweeps over one KV head's attention [G * m, S], in blocks of columns.

    The first sweep takes each row's exponentials relative to the row's maximum *in the block*, so
    that it needs one exponential per element and no second one when the maximum of the whole row
    is known: the second sweep multiplies the block's row by one factor. Heads share the buffers.
    """

    def __init__(
        self, group: int, count: int, tokens: int, history: int, soft_cap: float, like: Tensor
    ) -> None:
        rows = group * count
        self._group, self._count, self._tokens, self._history = group, count, tokens, history
        self._soft_cap = soft_cap
        block = _block_size(rows, tokens, like.device)
        self._spans = [(a, min(a + block, tokens)) for a in range(0, tokens, block)]
        self._keep = rows * tokens <= _KEEP_LOGITS
        number = len(self._spans)

        def fresh(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=like.device)

        kept = list(fresh(number if self._keep else 1, rows * block))
        kept = kept if self._keep else kept * number
        work = fresh(rows * block)
        sizes = [stop - start for start, stop in self._spans]
        self._kept = [k[: rows * n].view(rows, n) for k, n in zip(kept, sizes, strict=True)]
        self._work = [work[: rows * n].view(rows, n) for n in sizes]
        # Per block and row: largest logit, sum of exp(logit - largest) over all and over history
        # columns, and sum over history columns of exp(logit - largest) * (logit - largest).
        self._top, self._sum, self._before, self._dot = fresh(4, number, rows).zero_()
        self._factor = self._top  # set by the first sweep

    def _exponentials(self, index: int, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Logits less the row's maximum in the block, which is stored, and their exponentials."""
        start, stop = self._spans[index]
        logits, kept, top = self._work[index], self._kept[index], self._top[index][:, None]
        torch.mm(q, keys[start:stop].float().T, out=logits)
        if self._soft_cap > 0.0:
            logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        first = self._tokens - self._count  # position of the first query
        if stop > first + 1:
            at = torch.arange(start, stop, device=logits.device)
            own = torch.arange(first, self._tokens, device=logits.device)
            hidden = (at[None, :] > own[:, None]).repeat(self._group, 1)
            logits.masked_fill_(hidden, -math.inf)
        torch.amax(logits, 1, keepdim=True, out=top)
        top.clamp_min_(_LOWEST)  # a row that sees nothing here: exp(-inf - lowest) is 0
        logits.sub_(top)
        # A look at the smallest costs less than the other two, but on a GPU one would wait for it.
        if logits.device.type == "cpu" and float(logits.amin()) >= _FAR_BELOW:
            return logits, torch.exp(logits, out=kept)
        torch.exp(logits.clamp_min_(_FAR_BELOW), out=kept)
        return logits, torch.threshold_(kept, _EXP_FAR_BELOW, 0.0)

    def first(self, q: Tensor, keys: Tensor, sink: Tensor | None) -> Tensor:
        """Normalise: set the factor of every block and row; return the entropy (fp64)."""
        for i, (start, stop) in enumerate(self._spans):
            logits, e = self._exponentials(i, q, keys)
            torch.sum(e, 1, out=self._sum[i])
            if start >= self._history:
                continue
            if stop > self._history:
                e = e[:, : self._history - start]
                logits = logits[:, : self._history - start]
                torch.sum(e, 1, out=self._before[i])
            else:
                self._before[i] = self._sum[i]
            torch.sum(logits.mul_(e), 1, out=self._dot[i])
        top = self._top.amax(0)
        if sink is not None:
            top = torch.maximum(top, sink)
        below = (self._top - top).clamp_min_(_FAR_BELOW)
        factor = torch.threshold_(below.exp(), _EXP_FAR_BELOW, 0.0)
        total = (factor * self._sum).sum(0)
        if sink is not None:
            total += (sink - top).exp()
        self._factor = factor.div_(total)
        # -sum p ln p with ln p = (logit - block's top) + (block's top - top - ln total). Neither
        # part is positive, so nothing cancels.
        terms = below.sub_(total.log()).mul_(self._before).add_(self._dot)
        return -terms.mul_(factor).sum(dtype=torch.float64)

    def second(self, q: Tensor, keys: Tensor, out: _Out) -> None:
        """Write mean, variance and last row [G, S'] of this head."""
        group, count = self._group, self._count
        factors = (self._factor * _LIFT).view(-1, group, count, 1)
        weights = (self._factor * (_LIFT / count)).view(-1, group, 1, count)
        for i, (start, stop) in enumerate(self._spans):
            if start >= self._history:
                break
            e = self._kept[i] if self._keep else self._exponentials(i, q, keys)[1]
            per_head = e.view(group, count, stop - start)
            stop = min(stop, self._history)
            per_head = per_head[:, :, : stop - start]
            mean = torch.bmm(weights[i], per_head)
            torch.mul(mean[:, 0], 1.0 / _LIFT, out=out.mean[:, start:stop])
            if out.last is not None:
                out.last[:, start:stop] = per_head[:, -1] * factors[i][:, -1] / _LIFT
            if count == 1:
                out.var[:, start:stop] = 0.0
                continue
            # Two passes: mean of squares minus squared mean cancels where p hardly varies.
            size = group * count * (stop - start)
            deviation = self._work[i].flatten()[:size].view(per_head.shape)
            torch.addcmul(mean.neg_(), per_head, factors[i], out=deviation)
            squares = torch.sum(deviation.square_(), dim=1, out=out.var[:, start:stop])
            squares.mul_(1.0 / (_LIFT * _LIFT * (count - 1)))


def _block_size(rows: int, tokens: int, device: torch.device) -> int:
    if device.type != "cpu":
        return min(_BLOCK_GPU, tokens)
    return min(_BLOCK_CPU * max(1, torch.get_num_threads() * _ROWS_CPU // rows), tokens)

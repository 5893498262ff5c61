"""Window statistics in torch: for the CPU, and the reference for the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def gather_keys(key_cache: Tensor, pages: Tensor) -> Tensor:
    """Return the keys of some pages as [N, pages * block_size, D]."""
    dtype = key_cache.dtype
    tokens_first = key_cache.transpose(1, 2)
    if dtype.itemsize == 1:  # indexing knows no FP8; bytes it does
        taken = tokens_first.view(torch.uint8)[pages].view(dtype).float()
    else:
        taken = tokens_first[pages]
    return taken.flatten(0, 1).transpose(0, 1)


def sweep(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the statistics of one layer; fills ``mean`` and ``var``.

    Args:
        queries: As for :func:`~kvcompress_kernels.scoring.window_statistics`.
        keys: As there.
        scale: As there.
        soft_cap: As there.
        sinks: As there.
        mean: fp32 [H, S'].
        var: fp32 [H, S'].

    Returns:
        Entropy and shift as fp64 tensors of no dimension.

    """
    heads, count, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = heads // kv_heads
    blocks = _Blocks(group, count, tokens, mean.shape[1], soft_cap, keys)
    entropy = torch.zeros((), dtype=torch.float64, device=keys.device)
    for n in range(kv_heads):
        rows = slice(n * group, (n + 1) * group)
        q = queries[rows].flatten(0, 1).float() * scale
        sink = None if sinks is None else sinks[rows].float().repeat_interleave(count)
        entropy += blocks.first(q, keys[n], sink)
        blocks.second(q, keys[n], mean[rows], var[rows])
    return entropy, var.sum(dtype=torch.float64)


class _Blocks:
    """Both passes over one KV head's attention [G * m, S], in blocks of columns.

    The first pass takes each row's exponentials relative to the row's maximum *in the block*. So it
    needs one exponential per element, and none is computed again when the maximum of the whole row
    is known: the second pass multiplies the block's row by one factor. Heads share the buffers.
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
        # Which of the tokens after the first query are hidden from each.
        later = torch.arange(1, count, device=like.device)
        self._hidden = later > torch.arange(count, device=like.device)[:, None]

    def _exponentials(self, index: int, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Logits less the row's maximum in the block, which is stored, and their exponentials."""
        start, stop = self._spans[index]
        logits, kept, top = self._work[index], self._kept[index], self._top[index][:, None]
        torch.mm(q, keys[start:stop].float().T, out=logits)
        if self._soft_cap > 0.0:
            logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        self._fill_hidden(logits, index, -math.inf)
        torch.amax(logits, 1, keepdim=True, out=top)
        top.clamp_min_(_LOWEST)  # a row that sees nothing here: exp(-inf - lowest) is 0
        logits.sub_(top)
        self._fill_hidden(logits, index, 0.0)  # lest the smallest be there
        # A look at the smallest costs less than the other two, but on a GPU one would wait for it.
        if logits.device.type == "cpu" and float(logits.amin()) >= _FAR_BELOW:
            torch.exp(logits, out=kept)
        else:
            torch.exp(logits.clamp_min_(_FAR_BELOW), out=kept)
            torch.threshold_(kept, _EXP_FAR_BELOW, 0.0)
        self._fill_hidden(kept, index, 0.0)
        return logits, kept

    def _fill_hidden(self, block: Tensor, index: int, value: float) -> None:
        """Overwrite what belongs to tokens after a row's query. Mutates the block."""
        start, stop = self._spans[index]
        hidden_from = self._tokens - self._count + 1
        first = max(start, hidden_from)
        if first < stop:  # no look at the other columns: a mask of a whole block takes long
            tail = block.view(self._group, self._count, stop - start)[:, :, first - start :]
            tail.masked_fill_(self._hidden[:, first - hidden_from : stop - hidden_from], value)

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

    def second(self, q: Tensor, keys: Tensor, mean_out: Tensor, var_out: Tensor) -> None:
        """Write mean and variance [G, S'] of this head."""
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
            torch.mul(mean[:, 0], 1.0 / _LIFT, out=mean_out[:, start:stop])
            if count == 1:
                var_out[:, start:stop] = 0.0
                continue
            # Two passes: mean of squares minus squared mean cancels where p hardly varies.
            size = group * count * (stop - start)
            deviation = self._work[i].flatten()[:size].view(per_head.shape)
            torch.addcmul(mean.neg_(), per_head, factors[i], out=deviation)
            squares = torch.sum(deviation.square_(), dim=1, out=var_out[:, start:stop])
            squares.mul_(1.0 / (_LIFT * _LIFT * (count - 1)))


def _block_size(rows: int, tokens: int, device: torch.device) -> int:
    if device.type != "cpu":
        return min(_BLOCK_GPU, tokens)
    return min(_BLOCK_CPU * max(1, torch.get_num_threads() * _ROWS_CPU // rows), tokens)

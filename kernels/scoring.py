"""What the last queries of a prompt look at: the statistics window-based methods are built on.

CAKE needs the mean and the variance over the window's queries and two scalars of the layer,
DynamicKV and SnapKV need the mean (their window *sum* is the mean times the number of queries).
All of it falls out of one sweep over the attention probabilities, which are never held for more
than one KV head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns handled at once. Small enough for the working set of one KV head (group x window x block,
# fp32) to stay in a CPU core's L2 cache, where the element-wise passes run twice as fast.
_BLOCK_CPU = 512
_BLOCK_GPU = 16384
# Logits of one KV head are kept between the two passes up to this many elements (fp32); beyond it
# the second pass computes them again, so that memory does not grow with the prompt.
_KEEP_LOGITS = 1 << 24
# A logit this far below its row's log-sum-exp has probability exactly 0 in fp32; clamping there
# keeps 0 * (-inf) out of the entropy.
_FAR_BELOW = -1.0e4


@dataclass(frozen=True)
class WindowStatistics:
    """Attention of the window's queries on the history, one layer of one request.

    ``mean``: fp32 [H, S'], mean over the queries of the attention probability of each token.
    ``var``: fp32 [H, S'], unbiased variance over the queries (all zero if there is only one).
    ``entropy``: CAKE's dispersion H in nats, -sum p ln p over heads, queries and history columns.
    ``shift``: CAKE's temporal shift V, the sum of ``var``.

    Probabilities are normalised over *all* visible tokens, window included, and not again over
    the history.
    """

    mean: Tensor
    var: Tensor
    entropy: float
    shift: float


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
    ``keys``: [N, S, D], any float dtype, every key of the prompt after RoPE; query head h reads KV
    head h // (H / N). ``window``: protected tokens at the end; the history is the first
    S' = S - window. ``scale``: factor on the dot products (usually D ** -0.5). ``soft_cap``: if
    above 0, logits become soft_cap * tanh(logit / soft_cap). ``sinks``: [H], one extra logit per
    query head that takes part in the softmax denominator and nothing else.

    All arithmetic is fp32, the two scalars are accumulated in fp64. Nothing is mutated. Raises
    ValueError if shapes do not fit together or nothing lies before the window.

    Source: CAKE's dispersion, shift and indicator (arXiv 2503.12491); the released cakekv
    modify_llama.py takes the same sums in the model's dtype.
    """
    heads, count, dim = queries.shape
    kv_heads, tokens, key_dim = keys.shape
    _check(heads, count, dim, kv_heads, tokens, key_dim, window, sinks)
    group = heads // kv_heads
    history = tokens - window
    mean = torch.empty(heads, history, dtype=torch.float32, device=keys.device)
    var = torch.zeros_like(mean)
    entropy = torch.zeros((), dtype=torch.float64, device=keys.device)
    for n in range(kv_heads):
        rows = slice(n * group, (n + 1) * group)
        sink = None if sinks is None else sinks[rows].float().repeat_interleave(count)
        logits = _Logits(queries[rows], keys[n], scale, soft_cap)
        lse = _log_sum_exp(logits, sink)
        for start, stop, block in logits.blocks(history):
            entropy += _accumulate(block, lse, group, mean[rows, start:stop], var[rows, start:stop])
    shift = var.sum(dtype=torch.float64)
    both = torch.stack((entropy, shift)).tolist()  # one device synchronisation, not two
    return WindowStatistics(mean=mean, var=var, entropy=both[0], shift=both[1])


def _check(
    heads: int,
    count: int,
    dim: int,
    kv_heads: int,
    tokens: int,
    key_dim: int,
    window: int,
    sinks: Tensor | None,
) -> None:
    if dim != key_dim:
        raise ValueError(f"queries have head size {dim} but keys have {key_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot be shared by {kv_heads} KV heads")
    if not 1 <= count <= window:
        raise ValueError(f"queries must be 1 to window = {window} rows, got {count}")
    if window >= tokens:
        raise ValueError(f"no token lies before the window: {tokens} tokens, window {window}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")


class _Logits:
    """Scaled, capped, causally masked logits [G * m, S] of one KV head, in blocks of columns."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: float, soft_cap: float) -> None:
        self._group, self._count, dim = queries.shape
        self._queries = queries.reshape(-1, dim).float() * scale
        self._keys = keys
        self._soft_cap = soft_cap
        self.tokens = keys.shape[0]
        self._block = _BLOCK_CPU if keys.device.type == "cpu" else _BLOCK_GPU
        self._kept: dict[int, Tensor] = {}
        self._keep = self._queries.shape[0] * self.tokens <= _KEEP_LOGITS

    @property
    def rows(self) -> int:
        return self._queries.shape[0]

    def blocks(self, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks covering columns [0, end) as (start, stop, fp32 [G * m, stop - start])."""
        for start in range(0, end, self._block):
            whole = self._kept.get(start)
            if whole is None:
                whole = self._compute(start, min(start + self._block, self.tokens))
                if self._keep:
                    self._kept[start] = whole
            stop = min(start + self._block, end)
            yield start, stop, whole[:, : stop - start]

    def _compute(self, start: int, stop: int) -> Tensor:
        block = self._queries @ self._keys[start:stop].float().T
        if self._soft_cap > 0.0:
            block.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        first = self.tokens - self._count  # position of the first query
        if stop > first + 1:
            at = torch.arange(start, stop, device=block.device)
            own = torch.arange(first, self.tokens, device=block.device)
            hidden = (at[None, :] > own[:, None]).repeat(self._group, 1)
            block.masked_fill_(hidden, -math.inf)
        return block


def _log_sum_exp(logits: _Logits, sink: Tensor | None) -> Tensor:
    """fp32 [G * m, 1]: log of the softmax denominator of every row."""
    parts = [torch.logsumexp(block, dim=1) for _, _, block in logits.blocks(logits.tokens)]
    if sink is not None:
        parts.append(sink)
    return torch.logsumexp(torch.stack(parts), dim=0)[:, None]


def _accumulate(block: Tensor, lse: Tensor, group: int, mean: Tensor, var: Tensor) -> Tensor:
    """Write mean and var [G, K] of one block of history columns; return its entropy (fp64)."""
    log_p = (block - lse).clamp_min_(_FAR_BELOW)
    p = log_p.exp()
    # -p ln p from the logarithm that is at hand: no eps, and an exact 0 where p underflows.
    entropy = -torch.linalg.vecdot(p, log_p).sum(dtype=torch.float64)
    per_head = p.view(group, -1, p.shape[-1])
    mean.copy_(per_head.mean(dim=1))
    count = per_head.shape[1]
    if count > 1:
        # Two passes: mean of squares minus squared mean cancels where p hardly varies.
        deviation = per_head.sub_(mean[:, None, :])
        var.copy_(deviation.square_().sum(dim=1).div_(count - 1))
    return entropy

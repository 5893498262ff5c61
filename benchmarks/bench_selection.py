"""Scoring and selecting tokens: all layers of one prompt in one call, Llama-3.1-8B's shape.

    python -m benchmarks.bench_selection

For ``select_tokens`` there is also torch's own top-k with a sort of the ids; which of two equal
scores that takes is not defined.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_bench import Row, Shape, arguments, compare, write
from kvcompress_kernels.selection import (
    select_tokens,
    selection_cost,
    token_scores,
    token_scores_cost,
)
from kvcompress_kernels.winners import winners_per_layer


def main() -> None:
    """Measure and write the rows."""
    args = arguments("scoring and selection of tokens")
    lengths = ((2000, 200),) if args.small else ((8192, 1024), (32768, 1024), (131072, 1024))
    for tokens, count in lengths:
        write(_measure(args.shape, tokens, count, args.device), args.csv, args.device)


def attention_like(*shape: int, device: torch.device) -> Tensor:
    """Return numbers that are positive and spread over orders of magnitude, as attention is."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).mul_(2).exp_().div_(shape[-1])


def _measure(shape: Shape, tokens: int, count: int, device: torch.device) -> list[Row]:
    layers, heads, kv_heads = shape.layers, shape.heads, shape.kv_heads
    case = f"L={layers} H={heads} N={kv_heads} S={tokens} count={count}"
    scores = attention_like(layers, kv_heads, tokens, device=device)
    mean = attention_like(layers, heads, tokens, device=device)
    size = {"jobs": layers, "heads": kv_heads, "tokens": tokens}

    def topk() -> Tensor:
        return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values

    rows = compare(
        "select_tokens",
        case,
        partial(select_tokens, scores, [count] * layers),
        selection_cost(**size, count=count),
        device,
        {"torch.topk": topk},
    )
    # DynamicKV's count of winners per layer; the wait for the result is part of it.
    rows += compare(
        "winners_per_layer",
        case,
        partial(winners_per_layer, list(scores), count * kv_heads * layers),
        selection_cost(**size, count=0),
        device,
    )
    # CAKE's scores: variance, average pooling of width 5, mean over the heads.
    score = partial(
        token_scores, mean, mean * 0.1, gamma=200.0, kernel=5, mode="avg", num_kv_heads=kv_heads
    )
    cost = token_scores_cost(
        jobs=layers, heads=heads, kv_heads=kv_heads, tokens=tokens, kernel=5, has_var=True
    )
    return rows + compare("token_scores", case, score, cost, device)


if __name__ == "__main__":
    main()

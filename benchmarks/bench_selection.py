"""Time of scoring and selecting tokens: python -m benchmarks.bench_selection [--quick].

One call handles all 32 layers of a prompt in the shape of Llama-3.1-8B. "torch" is the twin; for
``select_tokens`` there is also torch's own top-k with a sort of the ids, which does not say how it
breaks ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvcompress_kernels.cost import Cost
from kvcompress_kernels.selection import (
    select_tokens,
    selection_cost,
    token_scores,
    token_scores_cost,
    winners_per_layer,
)

from .kernel_bench import Row, implementations, measure, parser, row, write


@dataclass(frozen=True)
class Shape:
    """``layers`` rows of ``kv_heads`` heads with ``tokens`` columns, of which ``count`` stay."""

    layers: int
    heads: int
    kv_heads: int
    tokens: int
    count: int

    @property
    def case(self) -> str:
        return (
            f"L={self.layers} H={self.heads} N={self.kv_heads} S={self.tokens} count={self.count}"
        )


def shapes(quick: bool, device: torch.device) -> list[Shape]:
    """The serving shapes; on the CPU a single layer, which is what it is asked to select at once
    there; with ``quick`` one small shape."""
    if quick:
        return [Shape(4, 8, 2, 2000, 200)]
    if device.type == "cpu":
        return [Shape(1, 32, 8, 8000, 1000), Shape(4, 32, 8, 8000, 1000)]
    return [Shape(32, 32, 8, tokens, 1024) for tokens in (8192, 32768, 131072)]


def attention_like(*shape: int, device: torch.device) -> Tensor:
    """Positive, and spread over several orders of magnitude, as attention is."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).mul_(2).exp_().div_(shape[-1])


def timed(
    kernel: str,
    shape: Shape,
    cost: Cost,
    device: torch.device,
    functions: dict[str, Callable[[], object]],
) -> list[Row]:
    """One row for every implementation in ``functions``."""
    rows = []
    for name, function in functions.items():
        rows.append(row(kernel, shape.case, name, measure(function, device=device), cost))
    return rows


def time_selection(shape: Shape, device: torch.device) -> list[Row]:
    scores = attention_like(shape.layers, shape.kv_heads, shape.tokens, device=device)
    counts = [shape.count] * shape.layers
    functions: dict[str, Callable[[], object]] = {
        name: partial(select_tokens, scores, counts, implementation=name)
        for name in implementations(device)
    }
    functions["torch.topk"] = lambda: (
        scores.topk(shape.count, dim=-1, sorted=False).indices.sort(dim=-1).values
    )
    cost = selection_cost(
        jobs=shape.layers, heads=shape.kv_heads, tokens=shape.tokens, count=shape.count
    )
    return timed("select_tokens", shape, cost, device, functions)


def time_winners(shape: Shape, device: torch.device) -> list[Row]:
    """DynamicKV's count of winners per layer; the wait for the result is part of it."""
    layers = list(attention_like(shape.layers, shape.kv_heads, shape.tokens, device=device))
    k = shape.count * shape.kv_heads * shape.layers
    cost = selection_cost(jobs=shape.layers, heads=shape.kv_heads, tokens=shape.tokens, count=0)
    functions: dict[str, Callable[[], object]] = {
        name: partial(winners_per_layer, layers, k, implementation=name)
        for name in implementations(device)
    }
    return timed("winners_per_layer", shape, cost, device, functions)


def time_token_scores(shape: Shape, device: torch.device) -> list[Row]:
    """CAKE's scores: variance, average pooling of width 5, mean over heads."""
    mean = attention_like(shape.layers, shape.heads, shape.tokens, device=device)
    var = mean * 0.1
    heads = shape.kv_heads
    functions: dict[str, Callable[[], object]] = {
        name: partial(
            token_scores,
            mean,
            var,
            gamma=200.0,
            kernel=5,
            mode="avg",
            num_kv_heads=heads,
            implementation=name,
        )
        for name in implementations(device)
    }
    cost = token_scores_cost(
        jobs=shape.layers,
        heads=shape.heads,
        kv_heads=heads,
        tokens=shape.tokens,
        kernel=5,
        has_var=True,
    )
    return timed("token_scores", shape, cost, device, functions)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("Scoring and selection of tokens.").parse_args(arguments)
    rows = [
        entry
        for shape in shapes(options.quick, options.device)
        for time in (time_selection, time_winners, time_token_scores)
        for entry in time(shape, options.device)
    ]
    write(rows, options.csv, options.device)


if __name__ == "__main__":
    main()

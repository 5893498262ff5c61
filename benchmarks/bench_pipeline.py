"""What compressing a prompt costs next to its prefill's attention, per layer.

    python -m benchmarks.bench_pipeline

Scoring, token scores, selection and compaction of one prompt, for one layer alone and for all
layers in one launch each; both per layer, next to torch's FlashAttention over the same prompt.
Goal on a GPU: less than 3 % of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_bench import (
    Row,
    Shape,
    Timing,
    arguments,
    implementations,
    measure,
    write,
)
from benchmarks.kernel_costs import KEEP, costs
from kvcompress_kernels.compaction import move_tokens
from kvcompress_kernels.cost import Cost
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.scoring import paged_window_statistics
from kvcompress_kernels.selection import select_tokens, token_scores

KERNEL = 5  # pooling width of CAKE
GAMMA = 200.0
PARTS = ("scoring", "token scores", "selection", "compaction")


def main() -> None:
    """Measure and write the rows, and print the shares of the prefill."""
    args = arguments("scoring to compaction of one prompt, next to its prefill")
    shape, tokens = args.shape, 2048 if args.small else 32768
    prefill = _prefill(shape, tokens, args.device)
    write([prefill], args.csv, args.device)
    wholes: list[Row] = []
    for jobs in (1, shape.layers):
        prompt = Prompt.random(shape, tokens, jobs, args.device)
        rows: list[Row] = []
        for implementation in implementations(args.device):
            # The twin takes long over all layers; one of them says enough.
            if jobs == 1 or implementation == "triton":
                rows += _pipeline(prompt, implementation)
        write(rows, args.csv, args.device)
        wholes += [entry for entry in rows if entry.kernel == "pipeline"]
    for entry in wholes:
        share = entry.timing.median / prefill.timing.median
        print(f"{entry.case}, {entry.implementation}: {share:.2%} of the prefill's attention")


@dataclass
class Prompt:
    """``jobs`` layers of one prompt in shuffled pages of a cache, with room for what is kept."""

    shape: Shape
    tokens: int
    queries: Tensor
    cache: Tensor
    source: Tensor
    target: Tensor

    @classmethod
    def random(cls, shape: Shape, tokens: int, jobs: int, device: torch.device) -> Prompt:
        """Normally distributed queries, keys and values in bf16."""
        width, kept = tokens // shape.block_size, KEEP // shape.block_size
        pages = torch.randperm(jobs * (width + kept)).to(device, torch.int32)
        cache = torch.randn(
            (len(pages), shape.block_size, shape.kv_heads, 2 * shape.head_size),
            dtype=torch.bfloat16,
            device=device,
        ).transpose(1, 2)
        queries = torch.randn(
            (jobs, shape.heads, shape.window, shape.head_size), dtype=torch.bfloat16, device=device
        )
        source, target = torch.split(pages, [jobs * width, jobs * kept])
        return cls(shape, tokens, queries, cache, source.view(jobs, -1), target.view(jobs, -1))


def _pipeline(prompt: Prompt, implementation: Implementation) -> list[Row]:
    """The whole and its parts, per layer."""
    shape, jobs = prompt.shape, prompt.queries.shape[0]
    history = prompt.tokens - shape.window
    count = KEEP - shape.window
    window = torch.arange(history, prompt.tokens, dtype=torch.int32, device=prompt.cache.device)
    window = window.expand(jobs, shape.kv_heads, -1)

    def score() -> tuple[Tensor, Tensor]:
        statistics = paged_window_statistics(
            prompt.queries,
            prompt.cache[..., : shape.head_size],
            prompt.source,
            num_tokens=[prompt.tokens] * jobs,
            window=shape.window,
            scale=shape.head_size**-0.5,
            implementation=implementation,
        )
        return statistics.mean, statistics.var

    def rate(mean: Tensor, var: Tensor) -> Tensor:
        return token_scores(
            mean,
            var,
            gamma=GAMMA,
            kernel=KERNEL,
            mode="avg",
            num_kv_heads=shape.kv_heads,
            implementation=implementation,
        )

    def select(scores: Tensor) -> Tensor:
        chosen = select_tokens(scores, [count] * jobs, implementation=implementation)
        return torch.cat((chosen, window), dim=2)

    def move(chosen: Tensor) -> None:
        move_tokens(
            prompt.cache,
            prompt.source,
            chosen,
            [KEEP] * jobs,
            prompt.target,
            implementation=implementation,
        )

    def whole() -> None:
        move(select(rate(*score())))

    mean, var = score()
    scores = rate(mean, var)
    chosen = select(scores)
    layer = costs(shape, prompt.tokens)
    parts: list[tuple[str, Callable[[], object], Cost]] = [
        ("pipeline", whole, sum((layer[part] for part in PARTS), Cost(0, 0))),
        ("pipeline: scoring", score, layer["scoring"]),
        ("pipeline: token scores", lambda: rate(mean, var), layer["token scores"]),
        ("pipeline: selection", lambda: select(scores), layer["selection"]),
        ("pipeline: compaction", lambda: move(chosen), layer["compaction"]),
    ]
    case = f"{prompt.tokens} tokens, keep {KEEP}, per layer, {jobs} at once"
    return [
        Row(kernel, case, implementation, _per_job(measure(part, device=mean.device), jobs), cost)
        for kernel, part, cost in parts
    ]


def _per_job(timing: Timing, jobs: int) -> Timing:
    return Timing(timing.median / jobs, timing.low / jobs, timing.high / jobs)


def _prefill(shape: Shape, tokens: int, device: torch.device) -> Row:
    """Causal attention of the whole prompt, one layer, query heads sharing KV heads."""
    query, key, value = (
        torch.randn((1, heads, tokens, shape.head_size), dtype=torch.bfloat16, device=device)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )

    def attend() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext()
    with flash:
        timing = measure(attend, device=device)
    cost = costs(shape, tokens)["prefill attention, to compare"]
    return Row("prefill attention", f"{tokens} tokens, one layer", "torch sdpa", timing, cost)


if __name__ == "__main__":
    main()

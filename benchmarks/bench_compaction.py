"""Moving survivors: all layers of one prompt in one launch, Llama-3.1-8B's cache.

    python -m benchmarks.bench_compaction

Goal on a GPU: at least 80 % of the copy bandwidth (column share_of_copy).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_bench import Row, Shape, arguments, compare, write
from kvcompress_kernels.compaction import compaction_cost, move_tokens
from vllm_kvcompress.paging.rounding import cdiv


def main() -> None:
    """Measure and write the rows."""
    args = arguments("survivors of all layers moved in one launch")
    shape = args.shape
    for tokens in (2048,) if args.small else (32768, 131072):
        for name, average in (("1024 a layer", 1024), ("25 %", tokens // 4)):
            case = f"{shape.layers} layers, {tokens} tokens, keep {name}"
            rows = _measure(shape, tokens, average, case, args.device)
            write(rows, args.csv, args.device)


def uneven_counts(shape: Shape, average: int) -> list[int]:
    """Whole pages per layer, from one and a half times ``average`` down to half of it."""
    pages = average // shape.block_size
    spread = torch.linspace(1.5, 0.5, shape.layers)
    counts = [int(pages * share) for share in spread.tolist()]
    counts[0] += pages * shape.layers - sum(counts)
    return [count * shape.block_size for count in counts]


def _measure(shape: Shape, tokens: int, average: int, case: str, device: torch.device) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    counts = uneven_counts(shape, average)
    source_width = cdiv(tokens, shape.block_size)
    target_width = max(counts) // shape.block_size
    layers = shape.layers
    pages = torch.randperm(layers * (source_width + target_width), generator=generator)
    source, target = torch.split(
        pages.to(device, torch.int32), [layers * source_width, layers * target_width]
    )
    # NHD: a token's KV heads lie side by side, key and value of a head too.
    cache = torch.zeros(
        (len(pages), shape.block_size, shape.kv_heads, 2 * shape.head_size),
        dtype=torch.bfloat16,
        device=device,
    ).transpose(1, 2)
    chosen = _random_tokens(shape, tokens, counts, device)
    move = partial(
        move_tokens,
        cache,
        source.view(layers, source_width),
        chosen,
        counts,
        target.view(layers, target_width),
    )
    cost = compaction_cost(sum(counts), shape.kv_heads, shape.head_size, shape.itemsize)
    return compare("compaction", case, move, cost, device)


def _random_tokens(shape: Shape, tokens: int, counts: list[int], device: torch.device) -> Tensor:
    """int32 [L, N, max(counts)]: ascending, every head its own; -1 from a layer's count on."""
    generator = torch.Generator(device).manual_seed(1)
    chosen = torch.full(
        (len(counts), shape.kv_heads, max(counts)), -1, dtype=torch.int32, device=device
    )
    for layer, count in enumerate(counts):
        rank = torch.rand(shape.kv_heads, tokens, generator=generator, device=device)
        best = rank.topk(count, dim=1).indices
        chosen[layer, :, :count] = best.sort(dim=1).values.int()
    return chosen


if __name__ == "__main__":
    main()

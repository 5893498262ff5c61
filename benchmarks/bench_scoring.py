"""Window statistics from pages: the scoring of one layer, and of several layers in one launch.

    python -m benchmarks.bench_scoring

Llama-3.1-8B's shape, bf16 keys in pages scattered over the pool. On the CPU and with --quick the
shape is small. Bytes are two reads of the keys and one write of the results.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernel_bench import Row, Shape, arguments, compare, write
from kvcompress_kernels.cost import Cost
from kvcompress_kernels.scoring import paged_window_statistics, scoring_cost

CASES = ((8192, 1), (8192, 4), (32768, 1), (131072, 1))  # prompt tokens, layers at once


def main() -> None:
    """Measure and write the rows."""
    args = arguments("attention statistics of the window's queries on a prompt")
    for tokens, jobs in ((1024, 1), (1024, 4)) if args.small else CASES:
        write(_measure(args.shape, tokens, jobs, args.device), args.csv, args.device)


def _measure(shape: Shape, tokens: int, jobs: int, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    heads, kv_heads, dim, page = shape.heads, shape.kv_heads, shape.head_size, shape.block_size
    pages = tokens // page
    # Keys and values share the pool; the kernel must step over the values.
    pool = torch.randn(jobs * pages, page, kv_heads, 2 * dim, dtype=torch.bfloat16, device=device)
    queries = torch.randn(jobs, heads, shape.window, dim, dtype=torch.bfloat16, device=device)
    cost = scoring_cost(tokens, heads, kv_heads, dim, shape.window, pool.element_size())
    case = f"{jobs} layers, {tokens} tokens, page {page}"
    score = partial(
        paged_window_statistics,
        queries,
        pool.transpose(1, 2)[..., :dim],
        torch.randperm(jobs * pages, device=device).view(jobs, pages),
        num_tokens=[tokens] * jobs,
        window=shape.window,
        scale=dim**-0.5,
    )
    return compare("scoring", case, score, sum([cost] * jobs, start=Cost(0, 0)), device)


if __name__ == "__main__":
    main()

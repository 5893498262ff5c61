"""Window statistics from pages: the scoring of one layer, and of several layers in one launch.

    python -m benchmarks.bench_scoring

Llama-3.1-8B's shape, bf16 keys in pages scattered over the pool. On the CPU and with --quick the
shape is small. Bytes are two reads of the keys and one write of the results.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernel_bench import (
    LLAMA_3_1_8B,
    SMALL,
    Row,
    Shape,
    implementations,
    measure,
    parser,
    row,
    write,
)
from kvcompress_kernels.scoring import paged_window_statistics, scoring_cost

CASES = ((8192, 1), (8192, 4), (32768, 1), (131072, 1))  # prompt tokens, layers at once


def main() -> None:
    """Measure and write the rows."""
    args = parser("attention statistics of the window's queries on a prompt").parse_args()
    small = args.quick or args.device.type == "cpu"
    shape = SMALL if small else LLAMA_3_1_8B
    for tokens, jobs in ((1024, 1), (1024, 4)) if small else CASES:
        write(_measure(shape, tokens, jobs, args.device), args.csv, args.device)


def _measure(shape: Shape, tokens: int, jobs: int, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    heads, kv_heads, dim, page = shape.heads, shape.kv_heads, shape.head_size, shape.block_size
    pages = tokens // page
    # Keys and values share the pool; the kernel must step over the values.
    pool = torch.randn(jobs * pages, page, kv_heads, 2 * dim, dtype=torch.bfloat16, device=device)
    queries = torch.randn(jobs, heads, shape.window, dim, dtype=torch.bfloat16, device=device)
    cost = scoring_cost(tokens, heads, kv_heads, dim, shape.window, pool.element_size())
    case = f"{jobs} layers, {tokens} tokens, page {page}"
    rows = []
    for implementation in implementations(device):
        score = partial(
            paged_window_statistics,
            queries,
            pool.transpose(1, 2)[..., :dim],
            torch.randperm(jobs * pages, device=device).view(jobs, pages),
            num_tokens=[tokens] * jobs,
            window=shape.window,
            scale=dim**-0.5,
            implementation=implementation,
        )
        timing = measure(score, device=device)
        total = sum((cost for _ in range(jobs - 1)), start=cost)
        rows.append(row("scoring", case, implementation, timing, total))
    return rows


if __name__ == "__main__":
    main()

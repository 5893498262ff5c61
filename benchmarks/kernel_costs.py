"""Bytes, operations and the time they take at the least: the table of docs/kernels.md.

    python -m benchmarks.kernel_costs

Nothing is measured here. The rates are the vendor's figures for an H100 SXM.
"""

from __future__ import annotations

from benchmarks.kernel_bench import LLAMA_3_1_8B, Shape
from kvcompress_kernels.compaction import compaction_cost
from kvcompress_kernels.cost import Cost
from kvcompress_kernels.page_tables import page_tables_cost
from kvcompress_kernels.scoring import scoring_cost
from kvcompress_kernels.selection import selection_cost, token_scores_cost
from vllm_kvcompress.paging.rounding import cdiv

BANDWIDTH = 3.35e12  # bytes/s
FLOP_RATE = 989e12  # bf16 on the tensor cores, dense
CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}
KEEP = 1024  # tokens a layer keeps
ROWS = 64  # requests of a decode step


def costs(shape: Shape, tokens: int) -> dict[str, Cost]:
    """What one layer of one prompt costs, and one decode step's page tables; keys say which."""
    heads, kv_heads, history = shape.heads, shape.kv_heads, tokens - shape.window
    pages = cdiv(KEEP, shape.block_size)
    attended = tokens * (tokens + 1) // 2
    return {
        "scoring": scoring_cost(
            tokens, heads, kv_heads, shape.head_size, shape.window, shape.itemsize
        ),
        "token scores": token_scores_cost(
            jobs=1, heads=heads, kv_heads=kv_heads, tokens=history, kernel=5, has_var=True
        ),
        "selection": selection_cost(
            jobs=1, heads=kv_heads, tokens=history, count=KEEP - shape.window
        ),
        "compaction": compaction_cost(KEEP, kv_heads, shape.head_size, shape.itemsize),
        "prefill attention, to compare": Cost(
            bytes=2 * (heads + kv_heads) * tokens * shape.head_size * shape.itemsize,
            flops=2 * 2 * heads * attended * shape.head_size,
        ),
        f"page tables, {ROWS} compressed rows": page_tables_cost(
            shape.layers, entries=shape.layers * ROWS * pages, rows=ROWS, tokens=ROWS
        ),
        f"page tables, {ROWS} plain rows": page_tables_cost(
            shape.layers,
            entries=shape.layers * ROWS * (tokens // shape.block_size),
            rows=ROWS,
            tokens=ROWS,
        ),
    }


def table(shape: Shape = LLAMA_3_1_8B) -> str:
    """The Markdown table, without a final newline."""
    lines = [
        "| kernel | prompt or context | MB | GFLOP | floor, µs |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_context = {name: costs(shape, tokens) for name, tokens in CONTEXTS.items()}
    for kernel in next(iter(by_context.values())):
        for context, entries in by_context.items():
            cost = entries[kernel]
            floor = cost.floor_seconds(BANDWIDTH, FLOP_RATE)
            lines.append(
                f"| {kernel} | {context} | {cost.bytes / 1e6:.2f} | {cost.flops / 1e9:.2f} "
                f"| {floor * 1e6:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""One decode step's page tables, lengths and slots of all layers, Llama-3.1-8B's cache.

    python -m benchmarks.bench_page_tables

"compressed": every row keeps 1024 tokens a layer on average. "plain": no row is compressed, so that
each layer's table holds the whole context, which is as much as a step can have to write.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.bench_compaction import uneven_counts
from benchmarks.kernel_bench import Row, Shape, arguments, compare, write
from kvcompress_kernels.page_tables import (
    ArenaTables,
    StepTables,
    fill_page_tables,
    page_tables_cost,
)

KEEP = 1024


def main() -> None:
    """Measure and write the rows."""
    args = arguments("page tables of one decode step, all layers in one launch")
    for context in (2048,) if args.small else (8192, 131072):
        for batch in (4,) if args.small else (8, 64, 256):
            for compressed in (True, False):
                rows = _measure(args.shape, context, batch, compressed, args.device)
                write(rows, args.csv, args.device)


def _measure(
    shape: Shape, context: int, batch: int, compressed: bool, device: torch.device
) -> list[Row]:
    size, layers = shape.block_size, shape.layers
    width = context // size
    used = torch.tensor([count // size for count in uneven_counts(shape, KEEP)], dtype=torch.int32)
    held = int(used.max())
    arena = ArenaTables(
        torch.randint(0, 10**6, (layers, batch, held), dtype=torch.int32, device=device),
        used[:, None].repeat(1, batch).to(device),
        # The last token of the step is the first one of a growth block.
        (used * size - context + 1)[:, None].repeat(1, batch).to(device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.arange(layers, dtype=torch.int64, device=device) * 10**6,
        step=1,
        block_size=size,
    )
    slots = torch.arange(batch) if compressed else torch.full((batch,), -1)
    out = StepTables.allocate(layers, batch, width, batch, device)
    pages = int((used + 1).sum()) if compressed else layers * width
    cost = page_tables_cost(layers, entries=pages * batch, rows=batch, tokens=batch)
    kind = "compressed" if compressed else "plain"
    case = f"{layers} layers, {batch} rows, {context} tokens, {kind}"
    fill = partial(
        fill_page_tables,
        arena,
        out,
        slots=slots.to(device, torch.int32),
        block_table=torch.randint(0, 10**6, (batch, width), dtype=torch.int32, device=device),
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
        num_tokens=batch,
    )
    return compare("page_tables", case, fill, cost, device)


if __name__ == "__main__":
    main()

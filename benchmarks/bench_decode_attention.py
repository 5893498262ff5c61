"""Decode attention at 128k tokens: full cache against compressed caches with per-layer tables.

    python -m benchmarks.bench_decode_attention

xformers' paged split-K operator over the tables and lengths of ``fill_page_tables``, one call per
layer. Goal: the time falls by at least 0.9 of the factor by which the bytes read do. Without a GPU,
or without xformers, it says so and writes nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_compaction import uneven_counts
from benchmarks.kernel_bench import Row, Shape, arguments, measure, write
from kvcompress_kernels.cost import Cost
from kvcompress_kernels.page_tables import ArenaTables, StepTables, fill_page_tables

# Four of Llama-3.1-8B's layers: four requests of 128k tokens of all 32 do not fit one GPU. Pages of
# 64 tokens, because the operator's tile of keys must not reach beyond a page.
SHAPE = Shape(layers=4, heads=32, kv_heads=8, head_size=128, block_size=64)
BATCH = 4


def main() -> None:
    """Measure and write the rows, and print how time and bytes compare."""
    args = arguments("decode attention on a full and on compressed caches")
    if args.device.type != "cuda":
        print("decode attention was not measured: xformers' operator needs a GPU")
        return
    if importlib.util.find_spec("xformers") is None:
        print("decode attention was not measured: xformers is not installed")
        return
    context = 8192 if args.quick else 131072
    full = _measure(context, None, f"{BATCH} x {context} tokens, full", args.device)
    write([full], args.csv, args.device)
    compressed = []
    for name, average in (("25 %", context // 4), ("6.25 %", context // 16), ("1024", 1024)):
        entry = _measure(context, average, f"{BATCH} x {context} tokens, {name}", args.device)
        write([entry], args.csv, args.device)
        compressed.append(entry)
    for entry in compressed:
        time = full.timing.median / entry.timing.median
        size = full.cost.bytes / entry.cost.bytes
        print(f"{entry.case}: {time:.2f} x faster, {size:.2f} x fewer bytes: {time / size:.2f}")


def _measure(context: int, average: int | None, case: str, device: torch.device) -> Row:
    """One decode step's attention of all layers; ``average`` tokens a layer, or all of them."""
    shape = SHAPE
    full = context // shape.block_size
    if average is None:
        used = [full] * shape.layers
    else:
        used = [count // shape.block_size for count in uneven_counts(shape, average)]
    held, layers = max(used), shape.layers
    total = sum(used) * BATCH
    # Each layer has its own number of pages; which ones is random, as after a while of serving.
    pages = torch.randperm(total, dtype=torch.int32)
    table = torch.zeros(layers, BATCH, held, dtype=torch.int32)
    parts = torch.split(pages, [count * BATCH for count in used])
    for layer, (count, part) in enumerate(zip(used, parts, strict=True)):
        table[layer, :, :count] = part.view(BATCH, count)
    counts = torch.tensor(used, dtype=torch.int32)[:, None].repeat(1, BATCH)
    arena = ArenaTables(
        table.to(device),
        counts.to(device),
        (counts * shape.block_size - context).to(device),
        torch.zeros(BATCH, dtype=torch.int32, device=device),
        torch.zeros(layers, dtype=torch.int64, device=device),
        step=1,
        block_size=shape.block_size,
    )
    out = StepTables.allocate(layers, BATCH, held, BATCH, device)
    fill_page_tables(
        arena,
        out,
        slots=torch.arange(BATCH, dtype=torch.int32, device=device),
        block_table=torch.zeros(BATCH, full, dtype=torch.int32, device=device),
        seq_lens=torch.full((BATCH,), context, dtype=torch.int32, device=device),
        query_start=torch.arange(BATCH + 1, dtype=torch.int32, device=device),
        num_tokens=BATCH,
    )
    cache = torch.randn(
        (total * shape.block_size, shape.kv_heads, 2 * shape.head_size),
        dtype=torch.bfloat16,
        device=device,
    )
    queries = torch.randn(
        (layers, BATCH, shape.heads, shape.head_size), dtype=torch.bfloat16, device=device
    )
    steps = [_attention(out, layer, queries[layer], cache) for layer in range(layers)]

    def step() -> None:
        for attend in steps:
            attend()

    tokens = total * shape.block_size
    per_token = 2 * shape.kv_heads * shape.head_size * shape.itemsize
    cost = Cost(
        bytes=tokens * per_token + 2 * queries.numel() * shape.itemsize,
        flops=2 * 2 * tokens * shape.heads * shape.head_size,
    )
    return Row("decode attention", case, "xformers", measure(step, device=device), cost)


def _attention(out: StepTables, layer: int, queries: Tensor, cache: Tensor) -> Callable[[], Tensor]:
    """One layer's call, with everything that a serving loop would do beforehand done."""
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask
    from xformers.ops.fmha.triton_splitk import FwOp

    batch, heads, dim = queries.shape
    slots, kv_heads, width = cache.shape
    group = heads // kv_heads
    bias = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch,
        kv_seqlen=out.seq_lens[layer].tolist(),
        block_tables=out.block_tables[layer],
        page_size=SHAPE.block_size,
        device=queries.device,
    )
    whole = cache.view(1, slots, kv_heads, 1, width).expand(-1, -1, -1, group, -1)
    key, value = torch.split(whole, dim, dim=-1)
    query = queries.view(1, batch, kv_heads, group, dim)

    def attend() -> Tensor:
        found: Tensor = fmha.memory_efficient_attention_forward(
            query, key, value, attn_bias=bias, op=FwOp
        )
        return found

    return attend


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Quality: RULER niah_single_2 for methods x budgets x block sizes x lengths.

Writes one CSV row a cell and seed and prints a Markdown table, the seeds summed. Greedy, all
prompts of a seed at once. Budgets are tokens per layer (window included) or shares of the prompt,
as on the command line of the server; "full" is a budget that nothing exceeds, so plain vLLM's path.
One engine serves all cells of a length and block size: methods are switched from inside, so that
prompts are prefilled once and then come from the prefix cache. Make the inputs first with
scripts/fetch_model.py and scripts/fetch_ruler.py.
"""

import argparse
import csv
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoTokenizer  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from vllm_kvcompress import LLM  # noqa: E402
from vllm_kvcompress.config import KVCompressionConfig, parse_budget  # noqa: E402
from vllm_kvcompress.evaluation.tasks.haystack import (  # noqa: E402
    TOKENS_TO_GENERATE,
    Needle,
    match,
    niah_single_2,
)
from vllm_kvcompress.planner import Planner  # noqa: E402

FULL = "full"


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    length: int
    method: str
    budget: int | float
    block_size: int


@dataclass(frozen=True)
class Row:
    """One line of the CSV. ``kept_tokens``: a layer's average capacity after the prefill."""

    task: str
    length: int
    method: str
    params: str
    budget: str
    block_size: int
    kept_tokens: int
    kept_share: float
    right: int
    prompts: int
    max_tokens: int
    seconds: float
    seed: int
    dtype: str
    model: str
    versions: str


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    models = Path(os.environ.get("KVC_TEST_MODELS", ROOT / "models"))
    parser.add_argument("--model", default=str(models / "qwen2.5-coder-0.5b-instruct"))
    parser.add_argument("--ruler", type=Path, default=ROOT / "models" / "ruler")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default="full,cake,uniform,dynamickv,random")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON for every method")
    parser.add_argument("--budgets", default="0.25,0.125,0.069,64", help="tokens or shares")
    parser.add_argument("--block-sizes", default="32")
    parser.add_argument("--lengths", default="1024")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", default="42", help="each makes another set of prompts")
    parser.add_argument("--cache-mib", type=int, default=900, help="KV cache of the engine")
    parser.add_argument("--max-tokens", type=int, default=TOKENS_TO_GENERATE)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality_niah_single_2.csv"
    )
    parser.add_argument("--append", action="store_true", help="keep the rows that are in --out")
    return parser.parse_args()


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The cells asked for, by length and block size; budgets that cannot be are left out."""
    for length in map(int, args.lengths.split(",")):
        for size in map(int, args.block_sizes.split(",")):
            for method in args.methods.split(","):
                if method == FULL:
                    yield Cell(length, FULL, length, size)
                    continue
                for budget in map(parse_budget, args.budgets.split(",")):
                    try:
                        KVCompressionConfig(method, budget, args.params).check_block_size(size)
                    except ValueError as error:
                        print(f"left out: {error}", file=sys.stderr)
                        continue
                    yield Cell(length, method, budget, size)


def kept_tokens(cell: Cell, params: dict[str, Any], prompt_len: int) -> int:
    """Tokens a layer holds on average after the prefill."""
    if cell.method == FULL:
        return prompt_len
    config = KVCompressionConfig(cell.method, cell.budget, params)
    plan = Planner(config, cell.block_size).plan(prompt_len)
    return plan.arena_blocks * cell.block_size if plan else prompt_len


def make_engine(args: argparse.Namespace, length: int, block_size: int) -> Any:
    """An engine whose requests choose their method, budget and parameters."""
    return LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        block_size=block_size,
        max_model_len=length + args.max_tokens,
        max_num_seqs=args.prompts,
        kv_cache_memory_bytes=args.cache_mib << 20,
        kv_compression="none",
        kv_compression_config={
            "allow": {"method": True, "budget": {"max": length}, "params": True}
        },
    )


def settings_of(cell: Cell, params: dict[str, Any]) -> dict[str, Any]:
    """What a request says to be compressed as a cell has it."""
    if cell.method == FULL:
        return {"kv_compression": "none"}
    return {
        "kv_compression": cell.method,
        "kv_compression_budget": cell.budget,
        "kv_compression_config": params,
    }


def measure(
    llm: Any, cell: Cell, seed: int, args: argparse.Namespace, needles: list[Needle]
) -> Row:
    """Answer all prompts of a seed."""
    start = time.perf_counter()
    params = {} if cell.method == FULL else args.params
    sampling = SamplingParams(
        temperature=0.0, max_tokens=args.max_tokens, extra_args=settings_of(cell, args.params)
    )
    outputs = llm.generate([n.prompt for n in needles], sampling, use_tqdm=False)
    # RULER's string_match_all before the mean; with one reference each prompt is right or wrong.
    right = sum(match(o.outputs[0].text, n.answers) for o, n in zip(outputs, needles, strict=True))
    longest = max(n.num_tokens for n in needles)
    kept = kept_tokens(cell, args.params, longest)
    packages = {name: version(name) for name in ("vllm", "torch", "transformers")}
    packages["python"] = platform.python_version()
    return Row(
        task="niah_single_2",
        length=cell.length,
        method=cell.method,
        params=json.dumps(params, sort_keys=True),
        budget=str(cell.budget),
        block_size=cell.block_size,
        kept_tokens=kept,
        kept_share=round(kept / longest, 4),
        right=int(right),
        prompts=len(needles),
        max_tokens=args.max_tokens,
        seconds=round(time.perf_counter() - start, 1),
        seed=seed,
        dtype=args.dtype,
        model=Path(args.model).name,
        versions=" ".join(f"{name}={number}" for name, number in packages.items()),
    )


def markdown(rows: list[Row]) -> str:
    """The table to print, seeds summed."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.length, row.method, row.block_size, row.budget, row.kept_tokens, row.kept_share)
        cells.setdefault(key, []).append(row)
    lines = [
        "| prompt | method | block | budget | held per layer | right | by seed |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for (length, method, size, budget, kept, share), same in cells.items():
        right, prompts = sum(r.right for r in same), sum(r.prompts for r in same)
        by_seed = ", ".join(f"{r.right}" for r in same)
        lines.append(
            f"| {length} | {method} | {size} | {budget} | {kept} ({share:.1%}) "
            f"| {right}/{prompts} | {by_seed} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows: list[Row] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    keep = args.append and args.out.exists()
    with args.out.open("a" if keep else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if not keep:
            writer.writeheader()
        groups = groupby(cells(args), key=lambda cell: (cell.length, cell.block_size))
        for (length, block_size), group in groups:
            llm = make_engine(args, length, block_size)
            wanted = list(group)
            for seed in seeds:
                needles = niah_single_2(
                    args.ruler,
                    lambda text: len(tokenizer(text)["input_ids"]),
                    length=length,
                    count=args.prompts,
                    seed=seed,
                )
                for cell in wanted:
                    row = measure(llm, cell, seed, args, needles)
                    writer.writerow(asdict(row))
                    file.flush()
                    rows.append(row)
                    print(
                        f"{cell} seed {seed}: {row.right}/{row.prompts} in {row.seconds} s",
                        file=sys.stderr,
                    )
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    print(markdown(rows))


if __name__ == "__main__":
    main()

"""Requests that run at one time, and tokens a second, compressed against plain vLLM in one process.

    python -m benchmarks.bench_capacity

64 requests of 4k different tokens, 128 generated tokens each, at two sizes of the pool: ``bound``,
where plain vLLM holds a few of them, and ``ample``, where it holds all. The engines take turns
within a round. Rows go to benchmarks/results/capacity.csv.

Three figures a case, because on a CPU nearly all the time goes into prefills, which compression
does not shorten: tokens a second over the whole run; over the steps without a prefill; and the
share of the run that plain vLLM spends in steps with a prefill, which bounds the first.
"""

import argparse
import csv
import datetime
import gc
import os
import random
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.bench.machine import processor
from vllm_kvcompress.tools.bench.measure import Queue, run_queue
from vllm_kvcompress.tools.bench.pairs import take_turns
from vllm_kvcompress.tools.bench.stepped_engine import SteppedEngine

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "capacity.csv"


@dataclass
class Row:
    """One line of the table."""

    date: str
    device: str
    torch: str
    vllm: str
    model: str
    case: str
    pool_blocks: int
    requests: int
    prompt: int
    generated: int
    budget: int
    running_plain: int
    running_compressed: int
    tokens_per_s_plain: str
    tokens_per_s_compressed: str
    ratio: str
    ratio_rounds: str
    decode_tokens_per_s_plain: str
    decode_tokens_per_s_compressed: str
    decode_ratio: str
    prefill_share_plain: str
    preemptions_plain: int
    preemptions_compressed: int
    paths: str


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(REPO / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--method", default="cake")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--plain-requests", type=int, default=3, help="that the bound pool holds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--cases", default="bound,ample")
    args = parser.parse_args()
    whole = -(-(args.prompt + args.generate) // args.block_size)
    pools = {
        "bound": args.plain_requests * whole + 2,
        # Compression holds the last prompt and its survivors at one time.
        "ample": args.requests * whole + 2 * whole,
    }
    for case in args.cases.split(","):
        _save(_case(args, case, pools[case]))
        gc.collect()  # the engines' memory, before the next ones start


def _case(args: argparse.Namespace, case: str, blocks: int) -> Row:
    import torch
    import vllm

    from vllm_kvcompress import LLM

    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_size": args.block_size,
        "max_model_len": args.prompt + args.generate,
        "max_num_seqs": args.requests,
        # The longest prompt in one step, beside a token for each of the others.
        "max_num_batched_tokens": args.prompt + args.generate + args.requests,
        "kv_cache_memory_bytes": blocks * _block_bytes(args),
        "enable_prefix_caching": False,
    }
    plain = SteppedEngine(LLM(args.model, **common))
    compressed = SteppedEngine(
        LLM(args.model, kv_compression=args.method, kv_compression_budget=args.budget, **common)
    )
    dice = random.Random(0)
    vocabulary = plain.engine.model_config.get_vocab_size()
    prompts = [
        [dice.randrange(100, vocabulary - 100) for _ in range(args.prompt)]
        for _ in range(args.requests)
    ]
    for subject in (plain, compressed):
        run_queue(subject, prompts[:1], 8)  # warm up
    runs = take_turns(
        args.rounds,
        lambda: run_queue(plain, prompts, args.generate),
        lambda: run_queue(compressed, prompts, args.generate),
    )
    manager = compressed.scheduler._arena
    taken = {p: manager.counters.prefills[p] for p in ("full", "cascade")}
    row = _row(args, case, blocks, runs, taken)
    row.torch, row.vllm = torch.__version__, vllm.__version__
    for subject in (plain, compressed):
        subject.close()
    return row


def _block_bytes(args: argparse.Namespace) -> int:
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(args.model)
    head = hf.hidden_size // hf.num_attention_heads
    return int(hf.num_hidden_layers * hf.num_key_value_heads * head * 2 * 2 * args.block_size)


def _row(
    args: argparse.Namespace,
    case: str,
    blocks: int,
    runs: list[tuple[Queue, Queue]],
    taken: dict[str, int],
) -> Row:
    plain, compressed = ([pair[i] for pair in runs] for i in (0, 1))
    ratios = [p.seconds / c.seconds for p, c in runs]

    def rate(group: list[Queue]) -> float:
        return statistics.median(r.tokens / r.seconds for r in group)

    def decode_rate(group: list[Queue]) -> float:
        return statistics.median(r.decode_tokens / r.decode_seconds for r in group)

    return Row(
        date=datetime.date.today().isoformat(),
        device=processor(),
        torch="",
        vllm="",
        model=Path(args.model).name,
        case=case,
        pool_blocks=blocks - 1,
        requests=args.requests,
        prompt=args.prompt,
        generated=args.generate,
        budget=args.budget,
        running_plain=max(r.most_running for r in plain),
        running_compressed=max(r.most_running for r in compressed),
        tokens_per_s_plain=f"{rate(plain):.1f}",
        tokens_per_s_compressed=f"{rate(compressed):.1f}",
        ratio=f"{statistics.median(ratios):.3f}",
        ratio_rounds=" ".join(f"{r:.3f}" for r in ratios),
        decode_tokens_per_s_plain=f"{decode_rate(plain):.1f}",
        decode_tokens_per_s_compressed=f"{decode_rate(compressed):.1f}",
        decode_ratio=f"{decode_rate(compressed) / decode_rate(plain):.2f}",
        prefill_share_plain=f"{1 - plain[0].decode_seconds / plain[0].seconds:.3f}",
        preemptions_plain=sum(r.preemptions for r in plain),
        preemptions_compressed=sum(r.preemptions for r in compressed),
        paths=" ".join(f"{k}={v}" for k, v in taken.items()),
    )


def _save(row: Row) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
    print(asdict(row), flush=True)


if __name__ == "__main__":
    main()

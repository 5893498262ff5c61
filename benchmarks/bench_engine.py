"""Decode step and time to first token, compressed against plain vLLM, in one process and run.

    python -m benchmarks.bench_engine off     # flag on, nothing compressed
    python -m benchmarks.bench_engine decode  # 8 requests x 8k context sharing one prefix
    python -m benchmarks.bench_engine ttft    # 4k and 8k prompts, with a breakdown

Plain and compressed engine take turns; every figure is a median over rounds. Rows are appended to
benchmarks/results/engine.csv.
"""

import argparse
import csv
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.bench.bounds import decode_bound
from vllm_kvcompress.tools.bench.machine import processor
from vllm_kvcompress.tools.bench.pairs import Paired, take_turns

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "engine.csv"
FIELDS = [
    *("date", "device", "torch", "vllm", "model"),
    *("case", "what", "plain_ms", "compressed_ms", "ratio", "spread", "bound", "note"),
]


def main() -> None:
    """Run one of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=["off", "decode", "ttft"])
    parser.add_argument("--model", default=str(REPO / "models" / "qwen2.5-coder-0.5b-instruct"))
    parser.add_argument("--method", default="cake")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-size", type=int, default=32)
    args = parser.parse_args()
    rows = {"off": _off, "decode": _decode, "ttft": _ttft}[args.case](args)
    _save(args, rows)


def _engines(args: argparse.Namespace, **settings: Any) -> tuple[Any, Any]:
    from vllm_kvcompress import LLM

    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_size": args.block_size,
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 2 << 30,
        **settings,
    }
    plain = LLM(args.model, **common)
    compressed = LLM(
        args.model, kv_compression=args.method, kv_compression_budget=args.budget, **common
    )
    return plain, compressed


def _tokens(llm: Any, count: int) -> list[int]:
    text = (REPO / "scripts" / "data" / "persuasion.txt").read_text(encoding="utf-8")
    ids = list(llm.get_tokenizer()(text)["input_ids"])
    return (ids * (count // len(ids) + 1))[:count]


def _decode_steps(llm: Any, prompts: list[list[int]], steps: int) -> list[float]:
    """Seconds of each decode step once all prompts are in."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=steps + 4, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    running = engine.engine_core.engine_core.scheduler.running
    seconds = []
    while engine.has_unfinished_requests():
        requests = list(running)
        ready = len(requests) == len(prompts) and all(
            r.num_computed_tokens > r.num_prompt_tokens for r in requests
        )
        start = time.perf_counter()
        engine.step()
        if ready:
            seconds.append(time.perf_counter() - start)
        running = engine.engine_core.engine_core.scheduler.running
    return seconds[:steps]


def _alternate(rounds: int, plain: Callable[[], float], compressed: Callable[[], float]) -> Paired:
    plain(), compressed()  # warm up
    pairs = take_turns(rounds, plain, compressed)
    return Paired(tuple(p for p, _ in pairs), tuple(c for _, c in pairs))


def _row(case: str, what: str, result: Paired, **more: Any) -> dict[str, Any]:
    plain, compressed = result.medians
    low, high = result.spread
    return {
        "case": case,
        "what": what,
        "plain_ms": f"{plain * 1e3:.2f}",
        "compressed_ms": f"{compressed * 1e3:.2f}",
        "ratio": f"{result.ratio:.3f}",
        "spread": f"{low:.3f}-{high:.3f}",
        **more,
    }


def _off(args: argparse.Namespace) -> list[dict[str, Any]]:
    plain, compressed = _engines(args)
    ids = _tokens(plain, 4096)
    prompts = [ids[100 * i : 100 * i + 200] for i in range(args.requests)]
    result = _alternate(
        args.rounds,
        lambda: statistics.median(_decode_steps(plain, prompts, 64)),
        lambda: statistics.median(_decode_steps(compressed, prompts, 64)),
    )
    return [_row("off", f"decode step, {args.requests} x 200 tokens", result)]


def _decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    plain, compressed = _engines(args)
    ids = _tokens(plain, args.context + 64 * args.requests)
    document = ids[: args.context]
    prompts = [
        document + ids[args.context + 64 * i : args.context + 64 * (i + 1)]
        for i in range(args.requests)
    ]
    result = _alternate(
        args.rounds,
        lambda: statistics.median(_decode_steps(plain, prompts, 24)),
        lambda: statistics.median(_decode_steps(compressed, prompts, 24)),
    )
    weights, full, kept = _bytes(plain, args)
    bound = decode_bound(weights, full, kept)
    note = f"bytes a step: weights {weights >> 20} MiB, KV {full >> 20} / {kept >> 20} MiB"
    what = f"decode step, {args.requests} x {args.context} tokens, budget {args.budget}"
    return [_row("decode", what, result, bound=f"{bound:.2f}", note=note)]


def _bytes(llm: Any, args: argparse.Namespace) -> tuple[int, int, int]:
    """Bytes a decode step reads: weights, full KV caches, compressed ones."""
    hf = llm.llm_engine.model_config.hf_config
    head = hf.hidden_size // hf.num_attention_heads
    token = hf.num_hidden_layers * 2 * hf.num_key_value_heads * head * 2
    weights = Path(args.model, "model.safetensors").stat().st_size
    full = token * args.requests * (args.context + 64)
    return weights, full, token * args.requests * args.budget


def _ttft(args: argparse.Namespace) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    plain, compressed = _engines(args, enable_prefix_caching=False)
    core = compressed.llm_engine.engine_core.engine_core
    compressor = core.model_executor.driver_worker.worker._session._compressor
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rows = []
    for length in (4096, 8000):
        prompt = {"prompt_token_ids": _tokens(plain, length)}

        def once(llm: Any, prompt: Any = prompt) -> float:
            start = time.perf_counter()
            llm.generate([prompt], params, use_tqdm=False)
            return time.perf_counter() - start

        compressor.seconds.clear()
        result = _alternate(args.rounds, lambda: once(plain), lambda: once(compressed))
        runs = args.rounds + 1
        note = ", ".join(f"{k} {v / runs * 1e3:.0f} ms" for k, v in compressor.seconds.items())
        rows.append(_row("ttft", f"time to first token, {length} tokens", result, note=note))
    return rows


def _save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import torch
    import vllm

    facts = {
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "model": Path(args.model).name,
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**facts, **row})
            print({**facts, **row})


if __name__ == "__main__":
    main()

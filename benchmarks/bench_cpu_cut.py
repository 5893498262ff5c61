"""What a cut costs on the CPU, without an engine, and with another checkout beside it.

    python -m benchmarks.bench_cpu_cut [--other CHECKOUT] [--model smollm2] [--rounds 9]

A prompt's layers are cut as in the engine: scored one after another from keys at hand and then cut
at once (full), or cut one after another (cascade). Each checkout runs in a process of its own, and
they take turns. Between layers other memory is read and written, as by the model's other
operations, without being timed.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

PHASES = ("all", "score", "allocate", "select", "move")
KINDS = ("full", "cascade")


class Shape(NamedTuple):
    """Layers, query heads, KV heads and elements of a head."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int


MODELS = {
    "smollm2": Shape(30, 9, 3, 64),
    "qwen": Shape(24, 14, 2, 64),
    "wide": Shape(16, 32, 8, 128),
}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure, and print medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, help="checkout to compare with")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--method", default="cake")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help="measure in this process when told to")
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    workers = {"this": start(ROOT)}
    if args.other is not None:
        workers["other"] = start(args.other.resolve())
    found: dict[tuple[str, str, str], list[float]] = {}
    for turn in range(args.rounds + 1):
        for name in sorted(workers, reverse=bool(turn % 2)):
            for kind in KINDS:
                times = ask(workers[name], kind)
                for phase in PHASES if turn else ():
                    found.setdefault((kind, phase, name), []).append(times.get(phase, 0.0))
    for worker in workers.values():
        worker.communicate()
    for kind in KINDS:
        for phase in PHASES:
            ms = {name: 1e3 * statistics.median(found[kind, phase, name]) for name in workers}
            line = f"{kind:8}{phase:10}" + "".join(f"{n}{t:9.2f} ms  " for n, t in ms.items())
            if args.other is not None and ms["other"]:
                line += f"ratio {ms['this'] / ms['other']:.3f}"
            print(line)


def start(checkout: Path) -> subprocess.Popen[str]:
    """Start this file with another checkout's packages."""
    path = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--serve"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: subprocess.Popen[str], kind: str) -> dict[str, float]:
    """Have a prompt cut; returns seconds by phase."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(kind + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("times "):
            return {k: float(v) for k, v in (w.split("=") for w in line.split()[1:])}
    raise RuntimeError("a worker ended early")


def serve(args: argparse.Namespace) -> None:
    """Cut a prompt for each line of stdin."""
    prompt = Prompt(args)
    for line in sys.stdin:
        times = prompt.full() if line.strip() == "full" else prompt.cascade()
        print("times", *(f"{k}={v}" for k, v in times.items()), flush=True)


class Prompt:
    """A prompt of random numbers in a pool of pages, and what cuts it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np
        import torch
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from vllm_kvcompress.engine.attention.cpu_codec import CpuPageCodec
        from vllm_kvcompress.eviction.compressor import Compressor
        from vllm_kvcompress.eviction.cut_reporter import CutReporter
        from vllm_kvcompress.paging.arena import PageArena, PageGeometry
        from vllm_kvcompress.paging.attention_layer import AttentionParams
        from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits
        from vllm_kvcompress.planning.config import KVCompressionConfig
        from vllm_kvcompress.planning.request_settings import RequestSettings

        torch.manual_seed(0)
        self.shape, self.tokens, size = MODELS[args.model], args.tokens, 32
        layers, heads, kv_heads, dim = self.shape
        config = KVCompressionConfig.parse({"method": args.method, "budget": args.budget})
        limits = EngineLimits(num_layers=layers, one_step_tokens=args.tokens)
        self.settings = RequestSettings(BlockPlanner(config, size, limits))
        self.window_size = self.settings.planner.window
        self.own = -(-args.tokens // size)
        self.budget = self.settings.planner.budget_blocks(args.tokens)
        blocks = 2 * self.own + self.budget + 1
        cache = torch.zeros(layers * blocks, kv_heads, size, 2 * dim, dtype=torch.bfloat16)
        isa = _get_attn_isa(torch.bfloat16, size, dim)
        self.codec = CpuPageCodec(cache, isa, "auto", torch.bfloat16)
        self.arena = PageArena(PageGeometry(np.arange(layers) * blocks, 1, blocks, size))
        self.reporter = CutReporter(False, size)
        params = [AttentionParams(dim**-0.5, 0.0, None)] * layers
        self.compressor = Compressor(self.arena, self.codec, params, self.reporter)
        # Some directions are more common than others, so that attention is neither flat nor blind.
        mix = torch.randn(dim, dim) * torch.linspace(2, 0, dim)
        self.keys, self.values = (
            (torch.randn(layers, args.tokens, kv_heads, dim) @ mix / 9).bfloat16() for _ in "kv"
        )
        queries = torch.randn(layers, self.window_size, heads, dim) @ mix / 9
        self.queries = queries.bfloat16()
        self.trash = torch.zeros(8 << 20)
        for layer in range(layers):
            self.store(layer, self.arena.geometry.pages(layer, range(1, self.own + 1)))

    def store(self, layer: int, pages: object) -> None:
        """Write a layer's keys and values to pages."""
        import torch

        keys, values = (x[layer].transpose(0, 1) for x in (self.keys, self.values))
        self.codec.write(torch.as_tensor(pages), keys, values)

    def request(self, prefill_blocks: int | None) -> object:
        """A prompt that has run up to its end."""
        from vllm_kvcompress.eviction.request import WorkerRequest

        first = self.own if prefill_blocks is None else prefill_blocks
        return WorkerRequest(
            prompt_len=self.tokens,
            settings=self.settings,
            schedule=self.settings.schedule(self.tokens),
            blocks=list(range(1, first + self.budget + 1)),
            computed=0,
            scheduled=self.tokens,
            prefill_blocks=prefill_blocks,
            window=self.queries.clone(),
        )

    def full(self) -> dict[str, float]:
        """Score layer by layer, then cut."""
        self.reporter.seconds.clear()
        request, total = self.request(None), 0.0
        for layer in range(self.shape.layers):
            self.trash.add_(1)
            begin = time.perf_counter()
            keys = self.keys[layer].transpose(0, 1)
            self.compressor.score_in_step(layer, request, keys)
            total += time.perf_counter() - begin
        begin = time.perf_counter()
        self.compressor.cut("r", request, request.window)
        total += time.perf_counter() - begin
        self.arena.drop("r")
        return {"all": total, **self.reporter.seconds}

    def cascade(self) -> dict[str, float]:
        """Cut layer by layer, from a workspace after the full prompt's blocks."""
        self.reporter.seconds.clear()
        prefill_blocks = self.settings.planner.cascade_prefill_blocks(self.tokens)
        request = self.request(prefill_blocks)
        request.blocks = [b + self.own for b in request.blocks]
        begin = time.perf_counter()
        cascade = self.compressor.begin_cascade("c", request)
        total = time.perf_counter() - begin
        takes_values = "values" in inspect.signature(cascade.cut_layer).parameters
        for layer in range(self.shape.layers):
            self.trash.add_(1)
            self.store(layer, cascade.sources[layer])
            begin = time.perf_counter()
            at_hand = [x[layer].transpose(0, 1) for x in (self.keys, self.values)]
            cascade.cut_layer(layer, *at_hand[: 1 + takes_values])
            total += time.perf_counter() - begin
        begin = time.perf_counter()
        cascade.finish()
        total += time.perf_counter() - begin
        self.arena.drop("c")
        return {"all": total, **self.reporter.seconds}


if __name__ == "__main__":
    main()

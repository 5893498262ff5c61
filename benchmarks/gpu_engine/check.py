"""Runs one check in this process and writes its rows: ``python -m benchmarks.gpu_engine.check``."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_engine import rehearsal
from benchmarks.gpu_engine.checks import CHECKS, DEFAULT_STARTS
from benchmarks.gpu_engine.engines import CPU_WORLD, GPU_WORLD
from benchmarks.gpu_engine.results import Row, append
from benchmarks.gpu_engine.speed import CPU_PLAN, GPU_PLAN, speed

FAILED = 3
"""Exit status of a check that did not hold, and says so in its rows; Python itself ends with 1."""


def run(name: str, backend: str, *, on_cpu: bool) -> Iterator[Row]:
    """Run a check of ``checks.py``, or ``speed``."""
    if name == "speed":
        plan = CPU_PLAN if on_cpu else GPU_PLAN
        return speed(plan, backend, on_cpu=on_cpu)
    return {**CHECKS, **DEFAULT_STARTS}[name](CPU_WORLD if on_cpu else GPU_WORLD, backend)


def main() -> int:
    """Run a check; the exit status says whether it held."""
    parser = argparse.ArgumentParser(description="one check of real engines")
    parser.add_argument("check")
    parser.add_argument("backend")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="appended to")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if args.check.startswith("sync_"):  # vLLM reads it when it is imported
        os.environ["VLLM_GPU_SYNC_CHECK"] = "error"
    if args.cpu:
        rehearsal.begin()
    rows: list[Row] = []
    verdict, begun = Row(args.check, args.backend, "ok"), time.monotonic()
    try:
        for row in run(args.check, args.backend, on_cpu=args.cpu):
            print(row, flush=True)
            rows.append(row)
    except Exception as error:
        traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        verdict = Row(args.check, args.backend, "failed", error=line[:500])
    seconds = f"{time.monotonic() - begun:.1f}"
    rows += [Row(f"{args.check} took", args.backend, seconds, "s"), verdict]
    append(args.csv, "engine", rows)
    return 0 if verdict.value == "ok" else FAILED


if __name__ == "__main__":
    sys.exit(main())

"""Shared parts of the kernel benchmarks: timing, the copy bandwidth to compare with, the CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from kvcompress_kernels.cost import Cost
from vllm_kvcompress.tools.bench.machine import processor

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.csv"
FIELDS = [
    *("date", "device", "torch", "triton", "kernel", "case", "implementation"),
    *("median_ms", "spread_ms", "gbytes", "gflop", "gb_per_s", "share_of_copy", "versus_torch"),
]
# Larger than the L2 of any device here (H100, H200: 50 MB). Writing it also keeps the device busy
# for longer than a launch takes, so that events do not measure how fast Python enqueues.
_FLUSH_BYTES = 512 << 20
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_WARM_UPS = 3
_MIN_RUNS, _MAX_RUNS = 5, 100
_SECONDS = 1.0  # a measurement stops after this long, once it has the least number of runs


@dataclass(frozen=True)
class Shape:
    """The numbers of a model and its cache that the kernels depend on; everything is bf16."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    window: int = 32
    block_size: int = 16
    itemsize: int = 2


LLAMA_3_1_8B = Shape(layers=32, heads=32, kv_heads=8, head_size=128)
SMALL = Shape(layers=2, heads=4, kv_heads=2, head_size=32)  # --quick, and the CPU


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of the runs."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        kernel: What ran.
        case: What it ran on.
        implementation: Rows that agree in kernel and case are compared with the one of "torch".
        timing: What was measured.
        cost: What the algorithm has to do, so that an implementation which moves more shows a lower
            bandwidth.

    """

    kernel: str
    case: str
    implementation: str
    timing: Timing
    cost: Cost


def arguments(description: str) -> argparse.Namespace:
    """Read the options that all kernel benchmarks have: --quick, --csv, --device.

    Args:
        description: What the benchmark measures.

    Returns:
        The options; ``small`` says whether the benchmark only shows that it works, and ``shape`` is
        the model's shape to use.

    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small shapes, to check the script")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="appended to")
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    args = parser.parse_args()
    args.small = args.quick or args.device.type == "cpu"
    args.shape = SMALL if args.small else LLAMA_3_1_8B
    return args


def implementations(device: torch.device) -> tuple[Literal["triton", "torch"], ...]:
    """Return the implementations worth timing; interpreted Triton on the CPU is not."""
    return ("torch",) if device.type == "cpu" else ("triton", "torch")


def compare(
    kernel: str,
    case: str,
    function: Callable[..., object],
    cost: Cost,
    device: torch.device,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> list[Row]:
    """Time all implementations of a kernel.

    Args:
        kernel: Its name.
        case: What it is applied to.
        function: Calls the kernel, with the keyword argument ``implementation``.
        cost: What the algorithm has to read, write and compute.
        device: Where it runs.
        others: Further functions that do the same, by name.

    """
    functions: dict[str, Callable[[], object]] = {
        name: functools.partial(function, implementation=name) for name in implementations(device)
    }
    return [
        Row(kernel, case, name, measure(run, device=device), cost)
        for name, run in {**functions, **(others or {})}.items()
    ]


def measure(function: Callable[[], object], *, device: torch.device) -> Timing:
    """Time a function.

    On a GPU with CUDA events around each run, the L2 cache being overwritten before it; a function
    that waits for the device is timed with that wait. On the CPU with a clock, caches as they are.

    Args:
        function: Does the same work each time.
        device: Where it does it.

    """
    for _ in range(_WARM_UPS):
        function()
    run = _gpu_run if device.type == "cuda" else _cpu_run
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _MAX_RUNS:
        seconds.append(run(function, device))
        if len(seconds) >= _MIN_RUNS and time.perf_counter() - begin > _SECONDS:
            break
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def _gpu_run(function: Callable[[], object], device: torch.device) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    _flush_buffer(device).zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _cpu_run(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that torch reads and writes while it copies a large buffer."""
    count = _COPY_BYTES[device.type] // 4
    source = torch.ones(count, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    timing = measure(lambda: target.copy_(source), device=device)
    return 2 * 4 * count / timing.median


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with its number of cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def write(rows: Sequence[Row], path: Path, device: torch.device) -> None:
    """Append the rows to the CSV at ``path`` (made with its header if absent) and print them."""
    twins = {(r.kernel, r.case): r.timing.median for r in rows if r.implementation == "torch"}
    copy = copy_bandwidth(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for row in rows:
            fields = _fields(row, copy, twins.get((row.kernel, row.case)), device)
            writer.writerow(fields)
            print(
                f"{row.kernel}, {row.case}, {row.implementation}: {fields['median_ms']} ms "
                f"({fields['spread_ms']}), {fields['gb_per_s']} GB/s = {fields['share_of_copy']} "
                f"of copy, {fields['versus_torch'] or '-'} x torch",
                flush=True,
            )


def _fields(row: Row, copy: float, twin: float | None, device: torch.device) -> dict[str, str]:
    timing = row.timing
    rate = row.cost.bytes / timing.median
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": str(import_module("triton").__version__) if find_spec("triton") else "",
        "kernel": row.kernel,
        "case": row.case,
        "implementation": row.implementation,
        "median_ms": f"{timing.median * 1e3:.4f}",
        "spread_ms": f"{timing.low * 1e3:.4f}-{timing.high * 1e3:.4f}",
        "gbytes": f"{row.cost.bytes * 1e-9:.6f}",
        "gflop": f"{row.cost.flops * 1e-9:.4f}",
        "gb_per_s": f"{rate * 1e-9:.1f}",
        "share_of_copy": f"{rate / copy:.4f}",
        "versus_torch": "" if twin is None else f"{twin / timing.median:.3f}",
    }

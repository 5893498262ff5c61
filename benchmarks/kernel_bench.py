"""Shared parts of the kernel benchmarks: timing, the copy bandwidth to compare with, the CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kvcompress_kernels.cost import Cost

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
    """The numbers of a model and its cache that the kernels depend on; bf16 throughout."""

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

    @property
    def spread(self) -> str:
        """``low-high`` in milliseconds, the form that :class:`Row` wants."""
        return f"{self.low * 1e3:.4f}-{self.high * 1e3:.4f}"


@dataclass(frozen=True)
class Row:
    """One line of the results.

    ``kernel``, ``case`` and ``implementation`` name what ran; rows that agree in the first two are
    compared with the one whose implementation is "torch". ``seconds_spread``: fastest and slowest
    run in milliseconds, "min-max". ``bytes`` and ``flops``: of the algorithm (``Cost``), so that
    an implementation which moves more shows a lower bandwidth.
    """

    kernel: str
    case: str
    implementation: str
    seconds_median: float
    seconds_spread: str
    bytes: int
    flops: int


def row(kernel: str, case: str, implementation: str, timing: Timing, cost: Cost) -> Row:
    """A :class:`Row` from what was measured and what had to be done."""
    return Row(kernel, case, implementation, timing.median, timing.spread, cost.bytes, cost.flops)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options all kernel benchmarks have: --quick, --csv, --device."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="small shapes, to check the script")
    result.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="appended to")
    result.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    return result


def implementations(device: torch.device) -> tuple[Literal["triton", "torch"], ...]:
    """What is worth timing: interpreted Triton on the CPU is not."""
    return ("torch",) if device.type == "cpu" else ("triton", "torch")


def measure(function: Callable[[], object], *, device: torch.device) -> Timing:
    """Time ``function``, which must do the same work each time.

    On a GPU: CUDA events around each run, with the L2 cache overwritten before it. A function that
    waits for the device is timed with that wait. On the CPU: a clock, caches as they are.
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
    """Bytes per second of torch's copy of a large buffer, read and written bytes together."""
    count = _COPY_BYTES[device.type] // 4
    source = torch.ones(count, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    timing = measure(lambda: target.copy_(source), device=device)
    return 2 * 4 * count / timing.median


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if models:
            name = models[0]
    return f"{name} x{torch.get_num_threads()}"


def triton_version() -> str:
    """Triton's version, or nothing where it is not installed."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def write(rows: Sequence[Row], path: Path, device: torch.device) -> None:
    """Append the rows to the CSV at ``path`` (made with its header if absent) and print them."""
    twins = {(r.kernel, r.case): r.seconds_median for r in rows if r.implementation == "torch"}
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
    rate = row.bytes / row.seconds_median
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "kernel": row.kernel,
        "case": row.case,
        "implementation": row.implementation,
        "median_ms": f"{row.seconds_median * 1e3:.4f}",
        "spread_ms": row.seconds_spread,
        "gbytes": f"{row.bytes * 1e-9:.6f}",
        "gflop": f"{row.flops * 1e-9:.4f}",
        "gb_per_s": f"{rate * 1e-9:.1f}",
        "share_of_copy": f"{rate / copy:.4f}",
        "versus_torch": "" if twin is None else f"{twin / row.seconds_median:.3f}",
    }

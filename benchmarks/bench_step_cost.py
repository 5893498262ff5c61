"""What a decode step costs the host beside plain vLLM: scheduler and worker, no model, no device.

    python -m benchmarks.bench_step_cost [--against CHECKOUT] [--rows 1,32,256,1024] [--rounds 5]

Both checkouts run in processes of their own and take turns; a figure is the median over the rounds
of the mean of 16 steps, in which each row gets a block once. The rows go to
``results/step_cost.csv``. ``scheduler`` is ``schedule`` less plain vLLM's scheduler with the same
requests, measured beside it; ``worker`` has no like in plain vLLM.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.bench.machine import facts

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "step_cost.csv"
FIELDS = (
    *("date", "device", "vllm", "settings", "rows", "part", "this_us", "this_spread"),
    *("other_us", "other_spread", "ratio"),
)
PARTS = ("plain_schedule", "schedule", "scheduler", "worker", "plain_admit", "admit")


class Checkout:
    """A process that measures one checkout."""

    def __init__(self, root: Path) -> None:
        environment = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'kernels'}"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "step_cost_world.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env=environment,
            text=True,
        )

    def ask(self, **words: Any) -> dict[str, float]:
        """Send a line and return the answer."""
        sent, received = self._process.stdin, self._process.stdout
        assert sent is not None
        assert received is not None
        sent.write(json.dumps(words) + "\n")
        sent.flush()
        line = received.readline()
        if not line:
            raise RuntimeError("the measuring process has ended; its stderr says why")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(
    checkouts: Sequence[Checkout], rows: int, rounds: int, extra: Mapping[str, Any]
) -> dict[str, list[list[float]]]:
    """Return microseconds by part, for each checkout one a round (one in all for admission)."""
    found: dict[str, list[list[float]]] = {part: [[] for _ in checkouts] for part in PARTS}
    for number, checkout in enumerate(checkouts):
        for part, value in checkout.ask(rows=rows, extra=extra).items():
            found[part][number].append(value)
        checkout.ask()
    for turn in range(rounds):
        order = list(enumerate(checkouts))
        for number, checkout in order if turn % 2 else reversed(order):
            for part, value in checkout.ask().items():
                found[part][number].append(value)
    return found


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rows", default="1,32,256,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--extra", type=json.loads, default={}, help="settings of kv_compression")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    roots = [HERE.parent, *([args.against.resolve()] if args.against else [])]
    checkouts = [Checkout(root) for root in roots]
    try:
        for rows in map(int, args.rows.split(",")):
            found = measure(checkouts, rows, args.rounds, args.extra)
            for part in PARTS:
                _write(args.csv, rows, part, found[part], json.dumps(args.extra))
    finally:
        for checkout in checkouts:
            checkout.close()


def _write(path: Path, rows: int, part: str, figures: list[list[float]], settings: str) -> None:
    machine = facts()
    line: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": machine["device"],
        "vllm": machine["vllm"],
        "settings": settings,
        "rows": rows,
        "part": part,
    }
    for name, values in zip(("this", "other"), figures, strict=False):
        line[f"{name}_us"] = f"{statistics.median(values):.1f}"
        line[f"{name}_spread"] = f"{min(values):.1f}-{max(values):.1f}"
    if len(figures) == 2:
        line["ratio"] = f"{statistics.median(figures[1]) / statistics.median(figures[0]):.2f}"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)
    print(*line.values(), flush=True)


if __name__ == "__main__":
    main()

"""Runs everything that docs/results.md stands on, and writes it.

    python -m benchmarks.run_report --dry-run      says how long it will take
    python -m benchmarks.run_report                runs what is missing
    python -m benchmarks.run_report --only qwen-1k

Ctrl-C stops it, and the same command goes on from there: every answer is on disk when the next one
begins. Records lie in out/report; what is committed is packed into benchmarks/results/quality.
Before: scripts/setup_env.sh, scripts/setup_kvpress_env.sh, scripts/fetch_model.py for both models
and scripts/fetch_ruler.py. The runs of speed come last and want the machine for themselves; remove
their files from benchmarks/results to measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import write_report
from benchmarks.report_runs import EVERYTHING, Bench, Run
from vllm_kvcompress.tools.evaluation.packed_results import pack, read_notes, unpack
from vllm_kvcompress.tools.evaluation.record import RECORDS, read

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out") / "report"
RESULTS = Path("benchmarks") / "results"
PACE = RESULTS / "pace.csv"
UNKNOWN_PACE = 1.0
"""Seconds of an answer of a run that has never been made."""
UNKNOWN_BENCH = 1800.0
"""Seconds of a benchmark that has never been made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, pack and write; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and stop")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="names of runs")
    parser.add_argument("--pack", action="store_true", help="run nothing: pack what is there")
    parser.add_argument(
        "--from-committed",
        action="store_true",
        help="take answers that are committed as given, where out/report has none of a run",
    )
    parser.add_argument("--kvpress", type=Path, default=Path(".venv-kvpress"), metavar="VENV")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    known = {run.name: run for run in EVERYTHING}
    strange = [name for name in args.only or () if name not in known]
    if strange:
        parser.error(f"there is no run {strange[0]!r}: known are {', '.join(known)}")
    chosen = [known[name] for name in args.only or known]
    if args.from_committed:
        for run in chosen:
            if isinstance(run, Run):
                take_committed(run)
    show(chosen, Console(width=120))
    if args.dry_run:
        return 0
    for run in chosen:
        if not args.pack and missing(run):
            start = time.perf_counter()
            status = execute(run, args.kvpress)
            if status:
                return status
            if isinstance(run, Bench):
                keep_speed(run, time.perf_counter() - start)
        if isinstance(run, Run):
            keep(run)
    return write_report.main([])


def folder(run: Run | Bench) -> Path:
    """Folder of a run's records."""
    return OUT / run.name


def committed(run: Run | Bench) -> Path:
    """File in which a run's records or a benchmark's rows are committed."""
    return (RESULTS / "quality" if isinstance(run, Run) else RESULTS) / f"{run.name}.csv"


def missing(run: Run | Bench) -> int:
    """Answers that are not on disk; a benchmark counts as one."""
    if isinstance(run, Bench):
        return int(not committed(run).is_file())
    # More prompts may be there than are asked for now.
    done = sum(record.index < run.prompts for record in read(folder(run) / RECORDS))
    return max(run.answers - done, 0)


def show(runs: Sequence[Run | Bench], console: Console) -> None:
    """Print what there is to do, and how long it took on the machine that was here before."""
    measured = _read_paces()
    paces = (measured["seconds"] / measured["answers"]).to_dict()
    table = Table("run", "answers", "missing", "hours", title="Runs of the report")
    total = 0.0
    for run in runs:
        left = missing(run)
        guess = UNKNOWN_PACE if isinstance(run, Run) else UNKNOWN_BENCH
        hours = left * paces.get(run.name, guess) / 3600
        total += hours
        shown = f"{hours:.1f}" if run.name in paces or not left else f"? {hours:.1f}"
        table.add_row(run.name, str(run.answers), str(left), shown)
    table.add_row("all", "", "", f"{total:.1f}")
    console.print(table)
    console.print(
        f"Hours of one core by {PACE}, as measured last. A question mark: never measured, "
        f"taken as {UNKNOWN_PACE:.0f} s an answer and {UNKNOWN_BENCH / 60:.0f} min a benchmark."
    )


def take_committed(run: Run) -> None:
    """Write the records that are committed where a run goes on from them; their texts are lost."""
    path, packed = folder(run) / RECORDS, committed(run)
    if path.exists() or not packed.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(record), default=dict) for record in unpack(packed)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def execute(run: Run | Bench, kvpress: Path) -> int:
    """Answer or measure what is missing; the exit status of ``kvcompress``."""
    other = isinstance(run, Run) and run.backend == "kvpress"
    output = folder(run)
    if isinstance(run, Bench):
        output.mkdir(parents=True, exist_ok=True)
        output /= run.name
    venv = kvpress if other else Path(sys.prefix)
    command = [str(venv / "bin" / "kvcompress"), *run.arguments(str(output))]
    print(f"{run.name}: {' '.join(command)}", flush=True)
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    # Ctrl-C reaches the child as well, which ends in its own time.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, before)
        )
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def keep(run: Run) -> None:
    """Pack the records of a run for the repository, and note how long they took.

    Settings have the order of the run, whenever they were answered. Overwrites the run's file in
    benchmarks/results/quality, and its line in pace.csv.
    """
    order = {label: place for place, label in enumerate((*run.methods, *run.variants))}
    records = sorted(
        read(folder(run) / RECORDS), key=lambda record: order.get(record.label, len(order))
    )
    log = folder(run) / "runs.jsonl"
    if not records or not log.is_file():  # nothing but what was committed
        return
    calls = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    versions = ", ".join(f"{name} {version}" for name, version in calls[-1]["versions"].items())
    path = committed(run)
    # Of the committed answers, from which the run may have continued.
    before = read_notes(path).get("device", "") if path.is_file() else ""
    devices = [*filter(None, before.split(", ")), *(call["device"] for call in calls)]
    notes = {
        **run.notes,
        "command": f"python -m benchmarks.run_report --only {run.name}",
        "versions": versions,
        "device": ", ".join(dict.fromkeys(devices)),
    }
    pack(records, path, notes)
    _note_pace(run.name, sum(c["answers"] for c in calls), sum(c["seconds"] for c in calls))


def keep_speed(bench: Bench, seconds: float) -> None:
    """Take the rows of a benchmark into the repository, and note how long it took.

    Overwrites its file in benchmarks/results, and its line in pace.csv.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder(bench) / f"{bench.name}.csv", committed(bench))
    _note_pace(bench.name, 1, seconds)


def _note_pace(name: str, answers: int, seconds: float) -> None:
    paces = _read_paces()
    paces.loc[name] = (answers, round(seconds))
    paces.sort_index().to_csv(PACE)


def _read_paces() -> pd.DataFrame:
    """Answers and seconds by run, as measured last."""
    if not PACE.is_file():
        return pd.DataFrame({"answers": [], "seconds": []}, dtype=int).rename_axis("run")
    return pd.read_csv(PACE, index_col="run")


if __name__ == "__main__":
    sys.exit(main())

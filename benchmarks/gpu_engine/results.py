"""Rows of the GPU suite: one per figure or check, each saying on what machine.

``python -m benchmarks.gpu_engine.results --csv FILE`` adds what the kernels' tests and benchmarks
had to say to the engines' rows.
"""

import argparse
import csv
import datetime
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FIELDS = (
    *("date", "device", "driver", "torch", "triton", "vllm", "part"),
    *("check", "case", "value", "unit", "error"),
)


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        check: What was looked at.
        case: On what: backend and the like.
        value: The figure, or ``ok`` or ``failed``.
        unit: Of the figure; empty for a verdict.
        error: What went wrong, in a line.

    """

    check: str
    case: str
    value: str
    unit: str = ""
    error: str = ""


def append(csv_file: Path, part: str, rows: list[Row]) -> None:
    """Append rows to a file, with its header if it is new.

    Args:
        csv_file: Its folder exists.
        part: Of the suite: engine, tests or speed.
        rows: To write.

    """
    machine = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    machine |= _machine()
    new = not csv_file.exists()
    with csv_file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**machine, "part": part, **vars(row)})


def _machine() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        device, driver = torch.cuda.get_device_name(), _driver()
    else:
        device, driver = "cpu, interpreted", ""
    versions = {name: _version(name) for name in ("torch", "triton", "vllm")}
    return {"device": device, "driver": driver, **versions, "torch": torch.__version__}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip()


def main() -> None:
    """Add rows of the kernels to the file."""
    parser = argparse.ArgumentParser(description="one file for engines and kernels")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="appended to")
    parser.add_argument("--kernels", type=Path, help="what the kernels' benchmarks wrote")
    parser.add_argument("--failed", nargs="*", default=[], help="tests or benchmarks that failed")
    args = parser.parse_args()
    rows = [Row(name, "", "failed", error="see the output") for name in args.failed]
    if args.kernels and args.kernels.exists():
        with args.kernels.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                case = f"{row['case']}, {row['implementation']}"
                rows.append(Row(row["kernel"], case, row["median_ms"], "ms"))
    append(args.csv, "kernels", rows)


if __name__ == "__main__":
    main()

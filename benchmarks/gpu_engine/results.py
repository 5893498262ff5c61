"""Rows of the GPU suite: one per figure or failed check, each saying on what machine."""

import csv
import datetime
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
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
    versions = {name: version(name) for name in ("torch", "triton", "vllm")}
    return {"device": device, "driver": driver, **versions, "torch": torch.__version__}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip()

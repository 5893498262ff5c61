"""A minute of the soak (scripts/soak.sh), which runs for an hour by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import MODELS, REPO, SMALL

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_minute_shows_no_fault(tmp_path: Path) -> None:
    words = [
        "--parts",
        "streaming",
        "--minutes",
        "1",
        "--round",
        "30",
        "--alone",
        "30",
        "--seed",
        "7",
    ]
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.soak", *words, "--output", str(tmp_path),
            "--model", str(MODELS / SMALL),
        ],
        cwd=REPO, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    # Nothing of what it is about failed to happen.
    assert figures["answers"] > 0
    assert figures["aborts"] > 0
    assert figures["clients_killed"] > 0
    assert figures["answers_equal"] > 0
    assert figures["blocks_at_the_end"] == 0
    assert sum(n for k, n in figures["counters"].items() if "cuts_total" in k) > 0

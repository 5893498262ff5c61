"""Scoring's tiles fit the shared memory of GPUs that none of this needs to have."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        pytest.param([256, 512], [89], id="the largest heads, the least memory"),
        pytest.param([64, 96, 128, 256, 512], [80, 89, 90, 100, 120], marks=pytest.mark.slow),
    ],
)
def test_head_sizes_fit(sizes: list[int], targets: list[int]) -> None:
    """Compiled for each target by the installed Triton, in bf16 and fp32, for windows 1 and 32."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    numbers = [str(number) for number in sizes], [str(number) for number in targets]
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    ran = subprocess.run(
        [*command, "--check", *numbers[0], "--targets", *numbers[1]],
        cwd=REPO,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line for line in ran.stdout.splitlines() if re.search("row_sums|columns", line)]
    assert len(rows) == 2 * 2 * len(sizes)
    assert "-" not in {cell for row in rows for cell in row.split(" | ")}

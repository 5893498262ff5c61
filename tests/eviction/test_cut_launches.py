"""How often a cut has a GPU do something, by the benchmark that counts it: Llama's shape, 8k."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.harness import REPO

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str, int], dict[str, int]]:
    """Per method, kind of cut, and number of requests that are cut in one step."""
    command = [sys.executable, "-m", "benchmarks.count_cut_launches", "--json"]
    command += ["--kinds", "prompt,decode", "--methods", "cake,dynamickv"]
    # Launches are counted of kernels as a GPU has them, not as the interpreter runs them.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        (row["method"], row["cut"], row["prompts"]): {
            "launches": row["aten"] + row["triton"],
            "uploads": row["uploads"],
            "syncs": row["syncs"],
        }
        for row in rows
    }


@pytest.mark.parametrize(
    ("method", "cut", "most"),
    [
        ("cake", "prompt", {"launches": 40, "uploads": 2, "syncs": 1}),
        ("dynamickv", "prompt", {"launches": 60, "uploads": 4, "syncs": 1}),
        ("cake", "decode", {"launches": 40, "uploads": 4, "syncs": 1}),
        ("dynamickv", "decode", {"launches": 40, "uploads": 4, "syncs": 1}),
    ],
)
def test_a_cut_is_a_handful_of_launches(
    counts: dict[tuple[str, str, int], dict[str, int]],
    method: str,
    cut: str,
    most: dict[str, int],
) -> None:
    for name, number in counts[method, cut, 1].items():
        assert number <= most[name], name
    # Windows are joined, and statistics of many long layers take a few turns.
    for prompts, turns in ((4, 2), (16, 5)):
        found, one = counts[method, cut, prompts], counts[method, cut, 1]
        assert found["launches"] <= turns * (one["launches"] + 1)
        assert found["uploads"] <= one["uploads"] + turns - 1
        assert found["syncs"] == one["syncs"]

"""Model runner V2, CUDA's default, on the CPU through Triton's interpreter."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.harness import REPO

pytestmark = pytest.mark.engine


def run_v2(limit: int, **job: Any) -> dict[str, Any]:
    """Run one job of v2_run.py in a process of its own; its result."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.v2_run", json.dumps(job)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (s for s in done.stdout.splitlines() if s.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
    return result


def _check_scatter(job: dict[str, Any], limit: int) -> None:
    plain = run_v2(limit, **job)
    scatter = run_v2(limit, method="scatter", **job)
    assert scatter["outputs"] == plain["outputs"]
    assert scatter["stats"]["prompt_cuts"] == len(job["prompts"]) * job["rounds"]


def test_scatter_equals_plain(prose: list[int]) -> None:
    """On and off block borders, chunked, the second round from the prefix cache."""
    prompts = [prose[:250], prose[50:114], prose[80:145], prose[90:91]]
    settings = {"max_num_batched_tokens": 160}
    job = {"prompts": prompts, "max_tokens": 8, "rounds": 2, "settings": settings}
    _check_scatter(job, limit=400)


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
@pytest.mark.parametrize("chunk", [2048, 160], ids=["one-step", "chunked"])
def test_scatter_equals_plain_for_200_tokens(prose: list[int], chunk: int, caching: bool) -> None:
    prompts = [prose[:640], prose[50:114], prose[80:145], prose[90:121], prose[7:8]]
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    job = {"prompts": prompts, "max_tokens": 200, "rounds": 1, "settings": settings}
    _check_scatter(job, limit=1500)


def test_cake_equals_model_runner_v1(engines: Any, prose: list[int]) -> None:
    """The same tokens kept, so the same output, whichever runner drives it."""
    prompts = [prose[:500], prose[100:164], prose[300:700]]
    engine = engines.get("cake", 128)
    kept = engine.record_kept()
    expected = engine.generate(prompts, 8)
    result = run_v2(400, method="cake", budget=128, prompts=prompts, max_tokens=8)
    assert sorted(result["kept"]) == sorted(kept)
    assert result["outputs"] == [expected]
    assert result["stats"]["prompt_cuts"] == len(kept) == 2

"""Every process that vLLM starts knows of compression what it has to know."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import REPO, small_model

pytestmark = pytest.mark.engine

SETTINGS = {"settings": {"method": "snapkv", "budget": 96, "window": 8}}
ENGINE = {**SETTINGS, "worker": "ArenaCPUWorker", "scheduler": "ArenaScheduler"}
SERVER = {**ENGINE, "judges requests": True, "metrics": "CompressionProm"}
NOTHING: dict[str, Any] = {}

EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "serve": {"EngineCore": ENGINE},
    "serve, two API servers": {"EngineCore": ENGINE, "ApiServer_0": SERVER, "ApiServer_1": SERVER},
    "serve, data parallel": {
        "VLLM_DP_Coordinator": NOTHING,
        "EngineCore_DP0": ENGINE,
        "EngineCore_DP1": ENGINE,
        "ApiServer_0": SERVER,
        "ApiServer_1": SERVER,
    },
    "serve, hybrid load balancing": {
        "VLLM_DP_Coordinator": NOTHING,
        "EngineCore_DP0": ENGINE,
        "EngineCore_DP1": ENGINE,
        "ApiServer_0": SERVER,
        "ApiServer_1": SERVER,
    },
    "serve, a port for each rank": {
        "APIServer_DPRank_0": SETTINGS,
        "APIServer_DPRank_1": SETTINGS,
    },
    "serve, headless": {"EngineCore_DP1": ENGINE},
    "run-batch": {"EngineCore": ENGINE},
    "bench throughput": {"EngineCore": ENGINE},
    "bench latency": {"EngineCore": ENGINE},
    "bench startup": {"Process-1": SERVER},
    "LLM, fork": {"EngineCore": ENGINE},
    "LLM, spawn": {"EngineCore": ENGINE},
    "AsyncLLM": {"EngineCore": ENGINE},
}


def test_what_each_process_knows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.process_matrix", small_model(), tmp_path],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        cwd=REPO, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == EXPECTED, done.stderr[-3000:]

"""scripts/batch_inference.py on a real engine: a run that is killed half-way and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import REPO, small_model

pytestmark = pytest.mark.engine

SCRIPT = REPO / "scripts" / "batch_inference.py"


def test_fifty_prompts_killed_half_way_are_answered_once_each(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    story = "The boat left the harbour early, and nobody on the pier waved. " * 12
    lines = []
    for i in range(50):
        words = f"{story}\nIt had {i} passengers. How many passengers did it have?"
        entry = {"messages": [{"role": "user", "content": words}]} if i % 2 else {"prompt": words}
        lines.append(json.dumps({"id": f"p{i}", **entry}))
    source.write_text("\n".join(lines))

    command = [sys.executable, str(SCRIPT), "--model", str(small_model())]
    command += ["--input", str(source), "--output", str(target), "--batch-size", "4"]
    command += ["--max-tokens", "12", "--kv-compression", "cake"]
    command += ["--kv-compression-budget", "96"]
    # Eager: compiling would take most of the test's time, twice.
    engine = {"max_model_len": 1024, "block_size": 32, "enforce_eager": True}
    engine["kv_cache_memory_bytes"] = 128 << 20
    command += ["--engine-args", json.dumps(engine)]
    log = (tmp_path / "log").open("wb")
    # One thread: more of them wait for each other wherever something else runs on the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def answers() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    first = start()
    deadline = time.monotonic() + 300
    while answers() < 20:
        assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, "no 20 answers within 300 s"
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert 20 <= answers() < 50

    second = start()
    try:
        assert second.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if second.poll() is None:
            os.killpg(second.pid, signal.SIGKILL)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(a["id"] for a in written) == sorted(f"p{i}" for i in range(50))
    assert [a for a in written if a["prompt_tokens"] <= 96 or not a["output_tokens"]] == []

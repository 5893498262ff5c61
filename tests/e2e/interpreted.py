"""A process in which model runner V2 and the Triton kernels run interpreted; see ``v2_run.py``."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

from tests.e2e.harness import REPO


class Interpreted:
    """Runs jobs one after the other, equal ones once; the process starts with the first."""

    def __init__(self) -> None:
        self._done: dict[str, dict[str, Any]] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def run(self, limit: float, **job: Any) -> dict[str, Any]:
        """Return a job's result.

        Args:
            limit: Seconds that it may take.
            job: What ``v2_run.py`` takes.

        Raises:
            AssertionError: The job failed or took too long; says what the process wrote last.

        """
        line = json.dumps(job, sort_keys=True)
        if line not in self._done:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.e2e.v2_run"],
                    cwd=REPO,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                )
            self._done[line] = result = self._ask(self._process, line, limit)
            runner = "gpu.model_runner.GPU" if job.get("gpu_worker") else "cpu.model_runner.CPU"
            assert result["outside"] == [], "ran outside of inference mode"
            assert result["runner"] == f"vllm.v1.worker.{runner}ModelRunner"
        return self._done[line]

    def _ask(self, process: "subprocess.Popen[str]", line: str, limit: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(limit, process.kill)
        clock.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = next((s for s in process.stdout if s.startswith("RESULT ")), None)
        finally:
            clock.cancel()
        if answer is None:
            code = process.wait()
            self._process = None
            self._log.seek(0)
            raise AssertionError(f"ended with {code}: {self._log.read()[-4000:]}")
        result: dict[str, Any] = json.loads(answer.removeprefix("RESULT "))
        return result

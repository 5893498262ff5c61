"""Runs prompts under model runner V2 without a GPU and prints the outputs as JSON.

V2's kernels are Triton's; its interpreter runs them on the CPU. That has to be arranged before
vLLM is imported, so the tests start this file as a process of its own.

    python -m tests.engine.v2_run '{"prompts": [[...]], "max_tokens": 20, "method": "scatter"}'
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any


class _Driver:
    """Makes vLLM believe that Triton has a CPU backend; the interpreter never asks it."""

    @staticmethod
    def is_active() -> bool:
        return True


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run one engine; see the module's docstring for the job's fields."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
    from tests.engine.harness import Engines

    method = job.get("method")
    engine = Engines().get(method, job.get("budget"), **job.get("settings", {}))
    rounds = [
        engine.generate(job["prompts"], job["max_tokens"]) for _ in range(job.get("rounds", 1))
    ]
    engine.check()
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    return {
        "outputs": rounds,
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "stats": engine.stats if method else {},
    }


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    print("RESULT", json.dumps(result))

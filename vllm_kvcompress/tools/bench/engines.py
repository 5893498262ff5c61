"""Starting the two engines in one process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.bench.job import BenchCase, BenchJob, Setup, check_memory
from vllm_kvcompress.tools.bench.stepped_engine import SteppedEngine
from vllm_kvcompress.tools.engine_arguments import (
    check_engine_arguments,
    llm_arguments,
    user_errors,
)

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Both engines would be bound to the same cores, and the machine's other cores would be idle.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What vLLM is told where the user's environment says nothing else."""

FIRST_WORDS = 100
"""Token ids below are often special ones."""


@contextmanager
def two_engines(job: BenchJob, setup: Setup) -> Iterator[tuple[SteppedEngine, SteppedEngine]]:
    """Start plain vLLM, then the engine with compression; both are gone afterwards.

    Changes the process's environment variables.

    Raises:
        CommandError: vLLM or the plugin refuses a setting, or the memory is too small.

    """
    # Engines are stepped by hand, so they must run in this process, whatever the user has set.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    free, total = _memory(job)
    check_memory(setup, job.weights, free)
    common = _arguments(job, setup, total)
    # The plain one first: until the other one starts, vLLM's own classes are in place.
    with (
        closing(_start(common)) as plain,
        closing(_start({**common, **llm_arguments(job.config)})) as compressed,
    ):
        yield plain, compressed


def prompts_of(job: BenchJob, engine: SteppedEngine, case: BenchCase) -> list[list[int]]:
    """Different prompts of random tokens; the same for both engines."""
    dice = random.Random(f"{job.seed} {case}")
    words = int(engine.llm_engine.model_config.get_vocab_size())
    first, last = (FIRST_WORDS, words - FIRST_WORDS) if words > 4 * FIRST_WORDS else (0, words)
    return [[dice.randrange(first, last) for _ in range(case.prompt)] for _ in range(case.requests)]


def _arguments(job: BenchJob, setup: Setup, total: int | None) -> dict[str, Any]:
    check_engine_arguments(job.engine_args)
    arguments: dict[str, Any] = {
        "model": job.model,
        "dtype": job.dtype,
        "block_size": job.block_size,
        "max_model_len": setup.max_model_len,
        "max_num_seqs": setup.max_num_seqs,
        "max_num_batched_tokens": setup.batched_tokens,
        "kv_cache_memory_bytes": setup.kv_bytes,
        # Every round uses the same prompts again.
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
    }
    if job.cpu:
        # vLLM compiles for minutes on a CPU.
        arguments["enforce_eager"] = True
    if total is not None:
        # With a size of the KV cache vLLM only checks that so much is free at the start.
        arguments["gpu_memory_utilization"] = min((setup.kv_bytes + job.weights) / total, 0.9)
    return {**arguments, **job.engine_args}


@user_errors()
def _start(arguments: dict[str, Any]) -> SteppedEngine:
    from vllm_kvcompress import LLM

    return SteppedEngine(LLM(**arguments))


def _memory(job: BenchJob) -> tuple[int, int | None]:
    """Return the bytes that are free for both engines, and on a GPU its whole memory."""
    if not job.cpu:
        import torch

        free, total = torch.accelerator.get_memory_info()
        return int(free), int(total)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(available) * 1024, None

"""A script: what each process that vLLM starts would know of compression.

Commands run as their users run them, up to the processes that they start: those are noted, with
what vLLM hands them, and not started. What a process would make of that is then found out in one
that knows no more than a process that vLLM has spawned: it has not loaded our plugin.

Prints a JSON object: command -> name of a process -> what it knows.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm.entrypoints.cli.main as cli
import vllm.entrypoints.cli.serve
import vllm.v1.engine.core  # noqa: F401 (once, and not in each fork)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine.coordinator import DPCoordinator

MODEL, FOLDER = sys.argv[1], Path(tempfile.mkdtemp(dir=sys.argv[2]))
SETTINGS = {"method": "snapkv", "budget": 96, "window": 8}
FLAGS = [
    "--kv-compression", "snapkv", "--kv-compression-budget", "96",
    "--kv-compression-config", '{"window": 8}',
]  # fmt: skip
ENGINE = [
    "--max-model-len", "256", "--block-size", "32", "--enforce-eager", "--dtype", "float32",
    "--kv-cache-memory-bytes", "67108864",
]  # fmt: skip
SERVE = ["serve", MODEL, *FLAGS, *ENGINE, "--host", "127.0.0.1", "--port", "0"]
BENCH = [*FLAGS, *ENGINE, "--model", MODEL]
RUN_BATCH = ["run-batch", "-i", str(FOLDER / "in.jsonl"), "-o", str(FOLDER / "out.jsonl"), *BENCH]
COMMANDS: dict[str, list[str]] = {
    "serve": SERVE,
    "serve, two API servers": [*SERVE, "--api-server-count", "2"],
    "serve, data parallel": [*SERVE, "--data-parallel-size", "2"],
    "serve, hybrid load balancing": [
        *SERVE, "--data-parallel-size", "2", "--data-parallel-hybrid-lb",
        "--data-parallel-size-local", "2",
    ],
    "serve, a port for each rank": [
        *SERVE, "--data-parallel-size", "2", "--data-parallel-size-local", "2",
        "--data-parallel-multi-port-external-lb",
    ],
    "serve, headless": [
        *SERVE, "--headless", "--data-parallel-size", "2", "--data-parallel-size-local", "1",
        "--data-parallel-start-rank", "1",
    ],
    "run-batch": RUN_BATCH,
    "bench throughput": ["bench", "throughput", "--num-prompts", "1", "--input-len", "8",
                         "--output-len", "1", "--dataset-name", "random", *BENCH],
    "bench latency": ["bench", "latency", *BENCH],
    "bench startup": ["bench", "startup", *BENCH],
}  # fmt: skip
LAST = ("APIServer_DPRank_1", "ApiServer_1")
"""Processes behind which no other starts."""


def command_line(words: list[str]) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["vllm", *words]
        cli.main()

    return run


def offline(**environment: str) -> Callable[[], None]:
    def run() -> None:
        os.environ.update(environment)
        from vllm_kvcompress import LLM

        LLM(
            MODEL, kv_compression="snapkv", kv_compression_budget=96,
            kv_compression_config={"window": 8}, max_model_len=256, block_size=32,
            enforce_eager=True, dtype="float32", kv_cache_memory_bytes=64 << 20,
        )  # fmt: skip

    return run


def asynchronous() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            MODEL, additional_config={"kv_compression": SETTINGS}, max_model_len=256,
            block_size=32, enforce_eager=True, dtype="float32", kv_cache_memory_bytes=64 << 20,
        )
    )  # fmt: skip


ROWS: dict[str, Callable[[], None]] = {
    **{name: command_line(words) for name, words in COMMANDS.items()},
    "LLM, fork": offline(VLLM_WORKER_MULTIPROC_METHOD="fork"),
    "LLM, spawn": offline(VLLM_WORKER_MULTIPROC_METHOD="spawn"),
    "AsyncLLM": asynchronous,
}


def found_in(value: Any) -> Any:
    """What vLLM tells a process of the engine, among all that it hands it."""
    if isinstance(value, (Namespace, EngineArgs, VllmConfig)):
        return value
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, (dict, list, tuple)) else ():
        if (found := found_in(part)) is not None:
            return found
    return None


def note_processes(run: Callable[[], None], file: Path) -> None:
    """Run a command, and write down each process that it wants to start."""
    noted: dict[str, bytes] = {}

    def start(process: Any) -> None:
        told = found_in([process._args, process._kwargs])
        noted[process.name] = pickle.dumps(told)
        file.write_bytes(pickle.dumps(noted))
        if process.name in LAST:
            raise SystemExit  # else vLLM would wait for it

    base: Any = multiprocessing.process.BaseProcess
    base.start = start
    DPCoordinator._wait_for_zmq_addrs = lambda *_: ("tcp://127.0.0.1:1",) * 3
    with contextlib.suppress(SystemExit):
        run()


def knows(told: Any) -> dict[str, Any]:
    """What a process makes of what it is told."""
    if told is None:
        return {}
    if isinstance(told, Namespace):
        told = AsyncEngineArgs.from_cli_args(told)
    elif isinstance(told, EngineArgs):
        told = EngineArgs(**vars(told))  # as LLM.from_engine_args does
    front = {}
    if isinstance(told, EngineArgs):
        if told.data_parallel_external_lb:
            # vLLM refuses it for models without experts.
            return {"settings": told.additional_config.get("kv_compression")}
        told = told.create_engine_config()
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        front = {
            "judges requests": hasattr(InputProcessor, "_kv_compression_wrapped"),
            "metrics": PrometheusStatLogger._kv_connector_cls.__name__,
        }
    return {
        "settings": told.additional_config.get("kv_compression"),
        "worker": told.parallel_config.worker_cls.rpartition(".")[2],
        "scheduler": told.scheduler_config.get_scheduler_cls().__name__,
        **front,
    }


def in_child(work: Callable[[], None], name: str) -> None:
    """Do it in a fork, and wait a while for it."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    signal.alarm(60)
    with (FOLDER / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        print(f"--- {name}", flush=True)
        try:
            work()
        except BaseException:
            # Of a process that has not started, vLLM notices it sooner or later.
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    (FOLDER / "in.jsonl").write_text("")
    result: dict[str, dict[str, Any]] = {}
    for number, (name, run) in enumerate(ROWS.items()):
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        noted, known = FOLDER / f"noted{number}", FOLDER / f"known{number}"
        in_child(lambda run=run, noted=noted: note_processes(run, noted), name)  # type: ignore[misc]
        result[name] = {}
        told = pickle.loads(noted.read_bytes()) if noted.exists() else {}
        same: dict[bytes, Any] = {}
        for process, data in told.items():

            def tell(data: bytes = data, known: Path = known) -> None:
                known.write_text(json.dumps(knows(pickle.loads(data))))

            if data not in same:
                known.unlink(missing_ok=True)
                in_child(tell, f"{name}: {process}")
                same[data] = json.loads(known.read_text()) if known.exists() else None
            result[name][process] = same[data]
    print(json.dumps(result))
    print((FOLDER / "log.txt").read_text(), file=sys.stderr)


if __name__ == "__main__":
    main()

"""Runs all checks of real engines, each in a process of its own with a time limit of its own.

    python -m benchmarks.gpu_engine.suite --csv FILE --seconds 280

An engine that hangs, dies or does not start is a row of its own, and the others go on.
"""

import argparse
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from benchmarks.gpu_engine.check import FAILED
from benchmarks.gpu_engine.checks import CHECKS, DEFAULT_STARTS
from benchmarks.gpu_engine.results import Row, append

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
SIDE_BY_SIDE = 8
"""Engines start on the CPU more than they run on the GPU."""

CHECK_SECONDS = 150
QUICK = ("serve", "scatter_graphs")
"""What ``--quick`` runs, with one backend."""


def main() -> int:
    """Run what the options ask for; the exit status says whether all of it held."""
    parser = argparse.ArgumentParser(description="checks of real engines, or their speed")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="appended to")
    parser.add_argument("--seconds", type=int, default=280, help="for all checks together")
    parser.add_argument("--speed", action="store_true", help="time engines instead")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    append(args.csv, "engine", [])  # checks that run side by side find a header
    backends = ("TRITON_ATTN",) if args.cpu else runnable(args.csv)
    if args.speed:
        jobs = [("speed", backend) for backend in backends]
    else:
        names = QUICK if args.quick else tuple(CHECKS)
        jobs = [(name, backend) for name in names for backend in backends]
    workers = 1 if args.cpu or args.speed else SIDE_BY_SIDE
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [
            pool.submit(check, name, backend, args.csv, deadline, on_cpu=args.cpu)
            for name, backend in jobs
        ]
        held = [job.result() for job in running]
    if not args.speed and not args.quick and not args.cpu:
        held += [
            check(name, "default", args.csv, deadline, on_cpu=False) for name in DEFAULT_STARTS
        ]
    print(f"== engines: {sum(held)} of {len(held)} checks held")
    return int(not all(held))


def runnable(csv_file: Path) -> tuple[str, ...]:
    """Return the backends whose kernels are here; a row says why another is not looked at."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface as flash
    except Exception as error:
        append(csv_file, "engine", [Row("import vllm", "", "failed", error=repr(error)[:500])])
        raise
    if flash.FA2_AVAILABLE or flash.FA3_AVAILABLE:
        return BACKENDS
    reason = f"{flash.FA2_UNAVAILABLE_REASON}; {flash.FA3_UNAVAILABLE_REASON}"
    append(csv_file, "engine", [Row("start", "FLASH_ATTN", "left out", error=reason)])
    return BACKENDS[1:]


def check(name: str, backend: str, csv_file: Path, deadline: float, *, on_cpu: bool) -> bool:
    """Run one check in a process of its own; return whether it held.

    Args:
        name: Of the check.
        backend: Of attention.
        csv_file: Gets its rows, or one that says what ended it.
        deadline: Of all checks, by ``time.monotonic``.
        on_cpu: Rehearse.

    """
    limit = min(deadline - time.monotonic(), 10 * CHECK_SECONDS if on_cpu else CHECK_SECONDS)
    command = [sys.executable, "-m", "benchmarks.gpu_engine.check", name, backend]
    command += ["--csv", str(csv_file), *(["--cpu"] if on_cpu else [])]
    if limit < 1:
        return _ended(name, backend, csv_file, "left out: no time was left", "")
    with tempfile.TemporaryFile() as log:
        status = _run(command, log, limit)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if status in (0, FAILED):  # it has written its verdict itself
        print(f"== {name} {backend}: status {status}", flush=True)
        if status:
            print(_last_lines(output), flush=True)
        return status == 0
    error = f"ended with {status}" if status is not None else f"took more than {limit:.0f} s"
    return _ended(name, backend, csv_file, error, output)


def _run(command: list[str], log: IO[bytes], limit: float) -> int | None:
    """Run a process, and end it and all that it has started after some time; None says so."""
    with subprocess.Popen(
        command,
        env=_environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Compilers that it has left behind too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Nothing is fetched or sent, and nothing needs a network to reach this process itself."""
    return {
        **os.environ,
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"), "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # Checks that run side by side share the cores.
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }


def _ended(name: str, backend: str, csv_file: Path, error: str, output: str) -> bool:
    print(f"== {name} {backend}: {error}\n{_last_lines(output)}", flush=True)
    append(csv_file, "engine", [Row(name, backend, "failed", error=error)])
    return False


def _last_lines(output: str) -> str:
    return "\n".join(output.splitlines()[-25:])


if __name__ == "__main__":
    sys.exit(main())

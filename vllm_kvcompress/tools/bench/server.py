"""A ``vllm serve`` on this machine that is always gone afterwards."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from vllm_kvcompress.tools.arguments import CommandError

HOST = "127.0.0.1"
VLLM = Path(sys.executable).with_name("vllm")
EVERY = 0.5
"""Seconds between two looks at a server."""


def environment() -> dict[str, str]:
    """Return what vLLM's processes are told: the user's, with this Python's tools found first."""
    path = os.pathsep.join([str(VLLM.parent), os.environ.get("PATH", os.defpath)])
    return {"VLLM_NO_USAGE_STATS": "1", **os.environ, "PATH": path}


def run(command: Sequence[str], log: Path, timeout: float) -> None:
    """Run one of vLLM's commands to its end.

    Args:
        command: Its words.
        log: File that takes its output.
        timeout: Seconds that it may take.

    Raises:
        CommandError: It fails, or takes longer; nothing of it is left running.

    """
    with _started(command, log) as process:
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CommandError(
                f"{' '.join(command[:3])} took more than --timeout {timeout:.0f} s, see {log}"
            ) from None
    if status:
        raise CommandError(f"{' '.join(command[:3])} failed: {last_complaint(log)} (see {log})")


@contextmanager
def serve(command: Sequence[str], port: int, log: Path, timeout: float) -> Iterator["Watch"]:
    """Start a server, wait until it answers, and watch the blocks that it holds.

    Args:
        command: Its words, with the port among them.
        port: On :data:`HOST`.
        log: File that takes its output.
        timeout: Seconds until it must answer.

    Raises:
        CommandError: It does not start in time.

    """
    with _started(command, log) as process:
        end = time.monotonic() + timeout
        while _get(port, "/health") is None:
            if process.poll() is not None:
                raise CommandError(f"vllm serve did not start: {last_complaint(log)} (see {log})")
            if time.monotonic() > end:
                raise CommandError(
                    f"vllm serve gave no sign within --timeout {timeout:.0f} s, see {log}"
                )
            time.sleep(EVERY)
        watch = Watch(port)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()


class Watch(threading.Thread):
    """Looks at a server's metrics every half second.

    Args:
        port: Of the server.

    Attributes:
        blocks: Most blocks out of the pool so far; 0 if no look found any.
        pool_blocks: Blocks that can be handed out; None: not known yet.

    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.blocks = 0
        self.pool_blocks: int | None = None
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        """See threading.Thread."""
        while not self._over.wait(EVERY):
            text = _get(self._port, "/metrics")
            if text is not None:
                self.look(text)

    def look(self, text: str) -> None:
        """Take in what /metrics said. Mutates the figures."""
        usage = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:kv_cache_usage_perc":
                    usage = sample.value
                elif sample.name == "vllm:cache_config_info":
                    # vLLM counts the null block here, and not in the share that is used.
                    self.pool_blocks = int(sample.labels["num_gpu_blocks"]) - 1
        if self.pool_blocks is not None:
            self.blocks = max(self.blocks, round(usage * self.pool_blocks))

    def stop(self) -> None:
        """Look no more; returns when the last look is over."""
        self._over.set()
        self.join()


def free_port() -> int:
    """A port of :data:`HOST` that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def last_complaint(log: Path) -> str:
    """The last line of a log that looks like an error's message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    complaints = [line for line in lines if re.search(r"rror: \S", line)]
    return (complaints or [line for line in lines if line] or ["it wrote nothing"])[-1]


def _get(port: int, path: str) -> str | None:
    """A page of the server; None if it gives none."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode()) if answer.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None


@contextmanager
def _started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env or environment(),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and everything it started: they share its process group."""
    for step, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, step)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.poll()

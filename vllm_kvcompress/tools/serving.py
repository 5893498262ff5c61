"""A `vllm serve` on this machine that is always gone when the `with` block ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.arguments import CommandError

HOST = "127.0.0.1"
VLLM = Path(sys.executable).with_name("vllm")


@dataclass(frozen=True)
class RunningServer:
    """A server that answers.

    Attributes:
        port: Its port on :data:`HOST`.
        log: File that takes its output.

    """

    port: int
    log: Path

    @property
    def url(self) -> str:
        """Its address, without a path and without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, timeout: float = 5) -> str | None:
        """Return one of its pages; None if none comes within so many seconds."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return str(answer.read().decode()) if answer.status == 200 else None
        except OSError:  # URLError is one
            return None

    def lines(self, prefix: str, since: int = 0) -> list[dict[str, Any]]:
        """Return the JSON objects that it logged, one a line, after a prefix.

        Args:
            prefix: The word before the object.
            since: Bytes at the start of the log that are not read.

        """
        text = self.log.read_bytes()[since:].decode(errors="replace")
        # A line without its end is still being written.
        return [json.loads(found) for found in re.findall(rf"\b{prefix} (\{{.*\}})\s*\n", text)]

    def wait_for(
        self, prefix: str, count: int, seconds: float = 30, since: int = 0
    ) -> list[dict[str, Any]]:
        """Wait until so many objects are in the log; return those that are, see :meth:`lines`."""
        end = time.monotonic() + seconds
        while len(found := self.lines(prefix, since)) < count and time.monotonic() < end:
            time.sleep(0.2)
        return found


@contextmanager
def serve(
    model: str,
    options: Sequence[str],
    log: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Start a server on a free port and wait until it answers.

    Args:
        model: Folder or hub id.
        options: Further words of `vllm serve`.
        log: File that takes its output; its folder is made if it is not there.
        timeout: Seconds until it must answer.
        environment: Variables in place of the user's.

    Raises:
        CommandError: It does not start in time.

    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    words = ["serve", model, *options, "--host", HOST, "--port", str(port)]
    # This Python's tools are found first.
    path = os.pathsep.join([str(VLLM.parent), os.environ.get("PATH", os.defpath)])
    env = {"VLLM_NO_USAGE_STATS": "1", **os.environ, "PATH": path, **(environment or {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(VLLM), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    server = RunningServer(port, log)
    end = time.monotonic() + timeout
    try:
        while server.get("/health") is None:
            if process.poll() is not None:
                raise CommandError(f"vllm serve did not start: {_last_complaint(log)} (see {log})")
            if time.monotonic() > end:
                raise CommandError(f"vllm serve gave no answer within {timeout:.0f} s, see {log}")
            time.sleep(0.3)
        yield server
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and everything it started: they share its process group."""
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.poll()


def _last_complaint(log: Path) -> str:
    """Return the last line of a log that looks like an error's message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    complaints = [line for line in lines if re.search(r"rror: \S", line)]
    return (complaints or [line for line in lines if line] or ["it wrote nothing"])[-1]

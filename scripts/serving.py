"""A `vllm serve` on this machine that is always gone when the `with` block ends."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_kvcompress.tools.bench.server import free_port, last_complaint

__all__ = ["Server", "ServerError", "free_port", "healthy", "serve", "stop"]


class ServerError(Exception):
    """The server did not start; the message says where to look."""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def log_size(self) -> int:
        return self.log.stat().st_size

    def log_lines(self, since: int = 0) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace").splitlines()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and everything it started: they share its process group."""
    for step, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, step)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.poll()


@contextmanager
def serve(
    model: str,
    options: list[str],
    log: Path,
    timeout: float,
    waiting: Callable[[float], object] = lambda _: None,
) -> Iterator[Server]:
    """Start the server, wait until it answers (calling `waiting` with the seconds), yield it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            begin = time.monotonic()
            while not healthy(url):
                seconds = time.monotonic() - begin
                if process.poll() is not None:
                    raise ServerError(
                        f"vllm serve did not start: {last_complaint(log)} (see {log})"
                    )
                if seconds > timeout:
                    raise ServerError(f"vllm serve gave no sign within {timeout:.0f} s, see {log}.")
                waiting(seconds)
                time.sleep(0.3)
            yield Server(url, log)
        finally:
            stop(process)

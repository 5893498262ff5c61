"""What a server shows of itself: memory of its processes, metrics, and lines of its log."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_kvcompress.tools.serving import RunningServer

OURS = "vllm:kv_compression_"
SHOWN = (
    OURS, "vllm:num_preemptions_total", "vllm:num_requests_running", "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total",
)  # fmt: skip
COMPLAINT = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback \(most recent|EngineDead")
EXPECTED = re.compile(r"\[hermes_tool_parser.py:|vllm.exceptions.VLLMValidationError: ")
"""vLLM logs an error when a tool's call is cut off by max_tokens, and when it refuses a stream; the
client that should not have been refused counts that as a fault itself."""
SOURCE = re.compile(r"^\(\w+ pid=\d+\) (?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\]")


def processes_of(port: int) -> dict[int, str]:
    """Return names by id of the processes of the server that this process started on a port."""
    found: dict[int, tuple[str, int, int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name, _, rest = (folder / "stat").read_text().rpartition(")")
            except OSError:  # it has just ended
                continue
            words = rest.split()
            found[int(folder.name)] = (name.partition("(")[2], int(words[1]), int(words[3]))
    for pid, (_, parent, session) in found.items():
        # A server leads a session of its own.
        if parent == os.getpid() and pid == session:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "--port" in words and words[words.index("--port") + 1] == str(port):
                return {p: name for p, (name, _, s) in found.items() if s == session}
    return {}


def resident(pid: int) -> int:
    """Return the bytes that a process holds in memory; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def open_files(pid: int) -> int:
    """Return how many files and sockets a process has open; 0 if it is gone."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the median slope between all pairs of points, which no single point can move far."""
    slopes = sorted(
        (y2 - y1) / (x2 - x1)
        for i, (x1, y1) in enumerate(points)
        for x2, y2 in points[i + 1 :]
        if x2 > x1
    )
    return slopes[len(slopes) // 2] if slopes else 0.0


@dataclass
class Watch:
    """Looks at one server.

    Attributes:
        server: Which.
        idle: Seconds since the first look and MiB of all its processes, each time nothing ran.
        by_process: MiB by the process's name, of the last look.
        files: Open files of all processes, at each of the same moments.
        last: The last metrics that came.

    """

    server: RunningServer
    idle: list[tuple[float, float]] = field(default_factory=list)
    by_process: dict[str, float] = field(default_factory=dict)
    files: list[int] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    _read: int = 0
    _began: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Note memory and open files now."""
        pids = processes_of(self.server.port)
        self.by_process = {f"{name} {pid}": resident(pid) / 2**20 for pid, name in pids.items()}
        self.idle.append((time.monotonic() - self._began, sum(self.by_process.values())))
        self.files.append(sum(map(open_files, pids)))

    def growth(self) -> float:
        """Return MiB per hour after the first third of the looks."""
        return slope(self.idle[len(self.idle) // 3 :]) * 3600

    def metrics(self) -> dict[str, float]:
        """Return the metrics in :data:`SHOWN` by name and own labels; empty if none come."""
        found: dict[str, float] = {}
        for line in (self.server.get("/metrics", timeout=30) or "").splitlines():
            if line.startswith(SHOWN) and "_bucket" not in line and "_created" not in line:
                name, value = line.rsplit(" ", 1)
                bare, _, labels = name.removesuffix("}").partition("{")
                own = [
                    label
                    for label in re.findall(r'\w+="[^"]*"', labels)
                    if not label.startswith(("engine=", "model_name="))
                ]
                key = bare + (f"{{{','.join(own)}}}" if own else "")
                found[key] = found.get(key, 0.0) + float(value)
        self.last = found or self.last
        return found

    def complaints(self) -> list[str]:
        """Return errors in the log since the last call, each with its traceback."""
        data = self.server.log.read_bytes()
        # A line without its end is still being written.
        end = data.rfind(b"\n") + 1
        text = data[self._read : end].decode(errors="replace")
        self._read = end
        errors: dict[str, list[str]] = {}
        for line in text.splitlines():
            if COMPLAINT.search(line):
                # All lines of one error begin alike.
                found = SOURCE.search(line)
                errors.setdefault(found[0] if found else line, []).append(line)
        whole = ["\n".join(lines) for lines in errors.values()]
        return [error for error in whole if not EXPECTED.search(error)]

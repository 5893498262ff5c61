"""What the server says about its compressed requests, read from its log.

With `log_requests` on, the worker writes one line `KVCOMPRESS {...}` for every request that it
compresses, and the scheduler one line `KVCOMPRESS_POOL {...}` when the prompt's blocks come back.
"""

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from serving import Server

LINE = re.compile(r"\b(KVCOMPRESS(?:_POOL)?) (\{.*\})\s*$")


@dataclass(frozen=True)
class Figures:
    blocks_before: int
    blocks_after: int
    tokens_per_layer: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    pool: dict[str, int] | None = None


def parse(lines: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of compression and of the pool, in the order of the log."""
    found: dict[str, list[dict[str, Any]]] = {"KVCOMPRESS": [], "KVCOMPRESS_POOL": []}
    for line in lines:
        if match := LINE.search(line):
            try:
                found[match[1]].append(json.loads(match[2]))
            except json.JSONDecodeError:  # a line that is still being written
                continue
    return found["KVCOMPRESS"], found["KVCOMPRESS_POOL"]


def figures(lines: list[str]) -> Figures | None:
    """The last compressed request in these lines, with what the pool said of the same request."""
    compressed, pool = parse(lines)
    if not compressed:
        return None
    last = compressed[-1]
    same = [record for record in pool if record["request"] == last["request"]]
    return Figures(
        blocks_before=last["blocks_before"],
        blocks_after=last["blocks_after"],
        tokens_per_layer=last["tokens_per_layer"],
        seconds=last.get("seconds", {}),
        pool=same[-1] if same else None,
    )


def wait_for_figures(server: Server, since: int, patience: float) -> Figures | None:
    """As `figures`, of what was logged after `since`; log lines may trail the answer a little."""
    deadline = time.monotonic() + patience
    while True:
        found = figures(server.log_lines(since))
        if (found and found.pool) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)

"""`vllm serve` as the tests start it, and what they ask of it."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.e2e.harness import DEFAULTS, small_model
from vllm_kvcompress.tools import serving

NAME = "small"
"""The name under which every server serves its model."""

PREFIX = "vllm:kv_compression_"


class Server(serving.RunningServer):
    """A running server with a client."""

    @cached_property
    def client(self) -> OpenAI:
        """OpenAI's client; it never retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def post(self, path: str, body: object, seconds: float = 60) -> tuple[int, Any]:
        """Send a JSON body; the status and the JSON object that came back, whatever the status."""
        answer = httpx.post(
            self.url + path,
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
            timeout=seconds,
        )
        return answer.status_code, answer.json()

    def tokenize(self, **body: Any) -> list[int]:
        """Token ids of a prompt or of messages, as the server makes them."""
        status, answer = self.post("/tokenize", {"model": NAME, **body})
        assert status == 200, answer
        return list(answer["tokens"])

    def metrics(self) -> dict[str, float]:
        """Our metrics by name, and their own labels where they have some."""
        page = self.get("/metrics", timeout=30)
        assert page is not None
        found = {}
        for line in page.splitlines():
            if line.startswith(PREFIX):
                name, value = line.removeprefix(PREFIX).rsplit(" ", 1)
                own = re.findall(r'(?:path|kind)="\w+"', name)
                bare = name.partition("{")[0]
                found[f"{bare}{{{own[0]}}}" if own else bare] = float(value)
        return found


@contextmanager
def serve(
    model: Path,
    log: Path,
    *,
    method: str,
    budget: int | float,
    config: dict[str, Any] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """Start a server with the engine settings of the harness; it is gone afterwards.

    Args:
        model: Folder of the model, served as :data:`NAME`.
        log: File to write.
        method: As for --kv-compression.
        budget: As for --kv-compression-budget.
        config: As for --kv-compression-config; requests are logged and every step is checked.
        options: More of `vllm serve`.

    Raises:
        CommandError: It does not start.

    """
    settings = {"log_requests": True, "check_integrity": True, **(config or {})}
    words = [
        "--served-model-name", NAME, "--dtype", DEFAULTS["dtype"], "--enforce-eager",
        "--max-model-len", str(DEFAULTS["max_model_len"]),
        "--block-size", str(DEFAULTS["block_size"]),
        "--max-num-seqs", str(DEFAULTS["max_num_seqs"]),
        "--max-num-batched-tokens", str(DEFAULTS["max_num_batched_tokens"]),
        "--kv-cache-memory-bytes", str(DEFAULTS["kv_cache_memory_bytes"]),
        "--kv-compression", method, "--kv-compression-budget", str(budget),
        "--kv-compression-config", json.dumps(settings), *options,
    ]  # fmt: skip
    environment = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with serving.serve(str(model), words, log, 300, environment) as running:
        yield Server(running.port, running.log)


class Servers:
    """Servers of the small model by their settings, each started when it is first asked for."""

    def __init__(self) -> None:
        self._running: dict[str, Server] = {}
        self._open = ExitStack()

    def close(self) -> None:
        """End all of them."""
        self._running.clear()
        self._open.close()

    def get(self, folders: pytest.TempPathFactory, **settings: Any) -> Server:
        """Return the server with these settings, see :func:`serve`."""
        key = repr(sorted(settings.items()))
        if key not in self._running:
            log = folders.mktemp("server") / "log.txt"
            self._running[key] = self._open.enter_context(serve(small_model(), log, **settings))
        return self._running[key]

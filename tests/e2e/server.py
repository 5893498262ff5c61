"""The real `vllm serve` on a real port, for tests, and what they ask of it."""

import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import serving
from tests.e2e.harness import DEFAULTS

VLLM = Path(sys.executable).with_name("vllm")
NAME = "small"
"""Under which every server serves its model."""

PREFIX = "vllm:kv_compression_"


class Server:
    """A running server.

    Args:
        url: Without a path and a slash at the end.
        log: File its output goes to.

    Attributes:
        client: OpenAI's, that never asks twice.

    """

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def lines(self, prefix: str) -> list[dict[str, Any]]:
        """JSON objects logged behind a prefix."""
        found = re.findall(rf"{prefix} (\{{.*\}})", self.log.read_text())
        return [json.loads(text) for text in found]

    def wait_for(self, prefix: str, count: int, seconds: float = 30) -> list[dict[str, Any]]:
        """Wait until that many lines are in the log."""
        end = time.monotonic() + seconds
        while len(self.lines(prefix)) < count and time.monotonic() < end:
            time.sleep(0.2)
        return self.lines(prefix)

    def post(self, path: str, body: object, seconds: float = 60) -> tuple[int, Any]:
        """Send a JSON body; the status and the JSON object that came back, whatever the status."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def tokenize(self, **body: Any) -> list[int]:
        """Token ids of a prompt or of messages, as the server makes them."""
        status, answer = self.post("/tokenize", {"model": NAME, **body})
        assert status == 200, answer
        return list(answer["tokens"])

    def metrics(self) -> dict[str, float]:
        """Our metrics by name, and their own labels where they have some."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        found = {}
        for line in lines:
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
        ServerError: It does not start.

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
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            started = stack.enter_context(serving.serve(str(model), words, log, timeout=500))
        yield Server(started.url, log)

"""Several API servers in front of one engine, and of two: each knows what a single one knows."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import LAYERS, small_model
from tests.e2e.server import NAME, Server, serve

pytestmark = pytest.mark.engine

BUDGET = 96
LENGTHS = [300 + 20 * i for i in range(12)]


@contextmanager
def started(folder: Path, options: Sequence[str]) -> Iterator[Server]:
    with serve(
        small_model(), folder / "log.txt", method="cake", budget=BUDGET,
        options=["--enable-log-requests", *options],
    ) as server:  # fmt: skip
        yield server


def ask(server: Server, prompt: list[int], **xargs: object) -> str:
    """Ask over a connection of its own, which the least busy server takes."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        answer = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=4, temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": xargs},
        )  # fmt: skip
    return str(answer.choices[0].text)


def all_at_once(work: Callable[[int], str], items: Sequence[int]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))


def check_all(server: Server, prose: list[int], engines: int) -> None:
    """What holds whatever number of API servers and engines there are."""

    def refused(_: int) -> str:
        with pytest.raises(BadRequestError) as caught:
            ask(server, prose[:8], kv_compression="zip")
        return str(caught.value)

    def answer(length: int) -> str:
        return ask(server, prose[:length])

    sentences = all_at_once(refused, range(16))
    assert all("kv_compression must be one of" in sentence for sentence in sentences)
    assert all_at_once(answer, LENGTHS) == all_at_once(answer, LENGTHS)
    taken = re.findall(r"\(ApiServer_(\d+) .*Added request", server.log.read_text())
    assert set(taken) == {"0", "1"}, Counter(taken)
    # The last step's figures may arrive a moment after its tokens.
    for _ in range(100):
        found = figures(server)
        if not total(found, "blocks_held"):
            break
        time.sleep(0.1)
    prompts = 2 * len(LENGTHS)
    assert total(found, "requests_total", method="cake", compressed="true") == prompts
    assert total(found, "cuts_total", kind="prompt") == prompts
    assert total(found, "blocks_freed_total") == 2 * sum(-(-n // 32) for n in LENGTHS)
    assert total(found, "prompt_tokens_seen_total") == 2 * sum(LENGTHS)
    assert total(found, "prompt_tokens_kept_total") == prompts * BUDGET
    assert total(found, "layer_tokens_kept_total") == prompts * BUDGET * LAYERS
    assert total(found, "blocks_held") == 0
    for engine in map(str, range(engines)):
        seen = total(found, "prompt_tokens_seen_total", engine=engine)
        for layer in map(str, range(LAYERS)):
            kept = total(found, "layer_tokens_kept_total", engine=engine, layer=layer)
            share = total(found, "layer_kept_share", engine=engine, layer=layer)
            assert share == pytest.approx(kept / seen)
    assert "died" not in server.log.read_text()


def figures(server: Server) -> list[Any]:
    page = server.get("/metrics", timeout=30)
    assert page is not None
    return [s for family in text_string_to_metric_families(page) for s in family.samples]


def total(found: list[Any], name: str, **labels: str) -> float:
    """Sum of our samples of that name; there must be some."""
    own = [
        s.value
        for s in found
        if s.name == f"vllm:kv_compression_{name}" and labels.items() <= s.labels.items()
    ]
    assert own, f"no {name}"
    return float(sum(own))


def test_two_servers_of_one_engine(tmp_path: Path, prose: list[int]) -> None:
    with started(tmp_path, ["--api-server-count", "2"]) as server:
        check_all(server, prose, engines=1)


@pytest.mark.slow
def test_data_parallel(tmp_path: Path, prose: list[int]) -> None:
    """Two engines with a pool each, which vLLM puts behind two servers."""
    with started(tmp_path, ["--data-parallel-size", "2"]) as server:
        check_all(server, prose, engines=2)
    # Each process names itself in front of what it logs.
    lines = [n for n in server.log.read_text().splitlines() if "KVCOMPRESS {" in n]
    assert len(lines) == 2 * len(LENGTHS)
    assert len({re.findall(r"pid=(\d+)", line)[0] for line in lines}) == 2

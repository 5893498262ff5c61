"""/metrics of a real server before and after: the figures are those of the requests in between."""

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import LAYERS, REPO
from tests.e2e.server import NAME, PREFIX, Server

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 256
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(server: Server) -> Figures:
    """Every sample by its name and its own labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as page:
        text = page.read().decode()
    found: Figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                found[sample.name.removeprefix(PREFIX), frozenset(own.items())] = sample.value
    return found


def ask(server: Server, prompt: list[int], max_tokens: int = 4, **xargs: object) -> None:
    server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": xargs},
    )  # fmt: skip


def test_the_arithmetic(strict: Server, prose: list[int]) -> None:
    ask(strict, prose[:8])
    before, noted = figures(strict), len(strict.lines("KVCOMPRESS_POOL"))
    lengths = [400, 777]
    for length in lengths:
        ask(strict, prose[1000 : 1000 + length])
    ask(strict, prose[:600], kv_compression="snapkv", kv_compression_budget=96)
    ask(strict, prose[:500], kv_compression="none")
    ask(strict, prose[:100])
    # The figures of the step that frees the last block come with the next step's.
    ask(strict, prose[:8], kv_compression="none")
    after = figures(strict)

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("requests_total", method="cake", compressed="true") == 2
    assert grown("requests_total", method="cake", compressed="false") == 1
    assert grown("requests_total", method="snapkv", compressed="true") == 1
    assert grown("requests_total", method="none", compressed="false") == 2
    # Kept by seen is what the budgets say.
    assert grown("prompt_tokens_seen_total", method="cake") == sum(lengths)
    assert grown("prompt_tokens_kept_total", method="cake") == 2 * BUDGET
    assert grown("prompt_tokens_seen_total", method="snapkv") == 600
    assert grown("prompt_tokens_kept_total", method="snapkv") == 96
    layers = [grown("layer_tokens_kept_total", layer=str(i)) for i in range(LAYERS)]
    assert sum(layers) == LAYERS * (2 * BUDGET + 96)
    assert len(set(layers)) > 1
    none: frozenset[tuple[str, str]] = frozenset()
    for layer in range(LAYERS):
        own = frozenset({("layer", str(layer))})
        seen = sum(n for (name, _), n in after.items() if name == "prompt_tokens_seen_total")
        share = after["layer_tokens_kept_total", own] / seen
        assert after["layer_kept_share", own] == pytest.approx(share)
    # Blocks given back are those of the prompts, and the pool says the same.
    blocks = sum(-(-length // BLOCK) for length in (*lengths, 600))
    assert grown("blocks_freed_total") == blocks
    pool = strict.wait_for("KVCOMPRESS_POOL", noted + 3)[noted:]
    assert sum(line["released"] for line in pool) == blocks
    assert grown("cuts_total", kind="prompt") == 3
    for phase in ("score", "allocate", "select", "move"):
        assert grown("phase_time_seconds_count", phase=phase) == 3
        assert grown("phase_time_seconds_sum", phase=phase) > 0
    assert after["blocks_free", none] + after["blocks_held", none] == pool[0]["total"]


def test_the_ratio_of_running_requests(strict: Server, prose: list[int]) -> None:
    """While one request of 1000 tokens answers: what plain vLLM would hold, by what it holds."""
    none: frozenset[tuple[str, str]] = frozenset()
    stream = strict.client.completions.create(
        model=NAME, prompt=prose[:1000], max_tokens=900, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    # The budget's 8 blocks instead of the prompt's 32, and those of the answer on both sides.
    possible = {p / h for p in range(32, 61) for h in range(p - 24, p - 21)}
    seen = []
    for _ in stream:
        seen.append(figures(strict)["ratio", none])
        if seen[-1] in possible:
            break
    stream.close()
    assert seen[-1] in possible, seen
    ask(strict, prose[:8], kv_compression="none")


def test_nothing_is_registered_while_off() -> None:
    """In a process that has never switched compression on, loading the plugin adds no metric."""
    import subprocess
    import sys

    code = (
        "from vllm_kvcompress.engine.plugin import register; register()\n"
        "import vllm.v1.metrics.loggers as loggers\n"
        "from prometheus_client import REGISTRY, generate_latest\n"
        "assert b'kv_compression' not in generate_latest(REGISTRY)\n"
        "assert loggers.PrometheusStatLogger._kv_connector_cls is loggers.KVConnectorProm\n"
        "assert not hasattr(loggers.KVConnectorLogging, '_kv_compression_wrapped')\n"
        "print('clean')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        cwd=REPO,
    )  # fmt: skip
    assert done.stdout.strip().endswith("clean"), done.stderr[-2000:]

"""The path a GPU takes, end to end on the CPU.

Model runner V2 and our Triton kernels, through Triton's interpreter, under either of vLLM's
attention backends: TRITON_ATTN, whose kernels the interpreter runs too, and FLASH_ATTN with
stand-ins for its kernels. Interpreting is slow, so the model is the first layers of a real one,
two and four. Decode steps run as FULL CUDA graphs would: with the metadata of the moment they were
captured (see ``v2_run.py``).
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.cut_model import first_layers, with_fp8_cache
from tests.e2e.engine import setting
from tests.e2e.harness import MODELS, SMALL, Engines
from tests.e2e.interpreted import Interpreted

pytestmark = pytest.mark.engine

LIMIT = 600
SETTINGS = {"block_size": 16, "max_num_batched_tokens": 64, "max_model_len": 512}
GRAPHS = [1, 2, 4]
TOKENS = {"TRITON_ATTN": 6, "FLASH_ATTN": 14}
LAYERS = {"TRITON_ATTN": 2, "FLASH_ATTN": 4}

Run = Callable[..., dict[str, Any]]


def model(backend: str) -> str:
    """The small model's first layers, as many as the backend has time for."""
    return str(first_layers(MODELS / SMALL, LAYERS[backend]))


Kept = list[list[list[list[int]]]]
"""Per cut, layer and head the tokens kept."""


def agreement(found: Kept, wanted: Kept) -> float:
    """Share of the tokens that should be kept and are."""
    pairs = [
        (set(f), set(w))
        for cut_found, cut_wanted in zip(found, wanted, strict=True)
        for layer_found, layer_wanted in zip(cut_found, cut_wanted, strict=True)
        for f, w in zip(layer_found, layer_wanted, strict=True)
    ]
    return sum(len(f & w) for f, w in pairs) / sum(len(w) for _, w in pairs)


@pytest.fixture
def run(v2: Interpreted) -> Run:
    """Run one engine with a GPU's attention."""

    def once(backend: str, **job: Any) -> dict[str, Any]:
        given = {"settings": SETTINGS, "model": model(backend), **job}
        return v2.run(LIMIT, **given, backend=backend)

    return once


@pytest.fixture(scope="module")
def prompts(prose: list[int]) -> list[list[int]]:
    """In chunks, on a block border, past one, and one token."""
    return [prose[:70], prose[40:88], prose[10:43], prose[7:8]]


def test_plain_vllm_replays_its_graphs(run: Run, prompts: list[list[int]]) -> None:
    """The stand-in for CUDA graphs is one that plain vLLM works with."""
    tokens = TOKENS["FLASH_ATTN"]
    eager = run("FLASH_ATTN", prompts=prompts, max_tokens=tokens)
    replayed = run("FLASH_ATTN", prompts=prompts, max_tokens=tokens, graphs=GRAPHS)
    assert eager["attention"] == replayed["attention"] == "FlashAttentionImpl"
    assert eager["replayed"] == 0
    assert replayed["replayed"] >= tokens - 2
    assert replayed["outputs"] == eager["outputs"]
    assert replayed["logprobs"] == eager["logprobs"]


@pytest.mark.parametrize(
    ("backend", "implementation"),
    [("TRITON_ATTN", "ArenaTritonImpl"), ("FLASH_ATTN", "ArenaFlashImpl")],
)
def test_scatter_equals_plain_in_full_graphs(
    run: Run, prompts: list[list[int]], backend: str, implementation: str
) -> None:
    """Pages in foreign layers, growth across block borders, and plain vLLM's very numbers."""
    tokens = TOKENS[backend]
    plain = run(backend, prompts=prompts, max_tokens=tokens)
    scatter = run(backend, prompts=prompts, max_tokens=tokens, method="scatter", graphs=GRAPHS)
    assert scatter["attention"] == implementation
    assert scatter["replayed"] >= tokens - 2
    # The first prompts are compressed while the last ones still prefill: eager steps of both kinds.
    assert scatter["stats"]["prompt_cuts"] == len(prompts)
    assert scatter["stats"]["compressed_steps"] > scatter["replayed"]
    assert scatter["outputs"] == plain["outputs"]
    assert scatter["logprobs"] == plain["logprobs"]


def test_fp8_scatter_equals_fp8_plain(run: Run, prompts: list[list[int]]) -> None:
    tokens = TOKENS["TRITON_ATTN"]
    job = {"prompts": prompts, "max_tokens": tokens}
    settings = {**SETTINGS, "kv_cache_dtype": "fp8"}
    plain = run("TRITON_ATTN", **job, settings=settings)
    scatter = run("TRITON_ATTN", **job, settings=settings, method="scatter", graphs=GRAPHS)
    assert plain["logprobs"] != run("TRITON_ATTN", **job)["logprobs"]
    assert scatter["stats"]["prompt_cuts"] == len(prompts)
    assert scatter["outputs"] == plain["outputs"]
    assert scatter["logprobs"] == plain["logprobs"]


@pytest.mark.parametrize(
    ("method", "backend", "dtype"),
    [
        ("cake", "FLASH_ATTN", "auto"),
        ("dynamickv", "FLASH_ATTN", "auto"),
        ("cake", "TRITON_ATTN", "auto"),
        ("cake", "TRITON_ATTN", "fp8"),
    ],
)
def test_a_method_keeps_what_it_keeps_on_the_cpu_backend(
    run: Run, engines: Engines, prose: list[int], method: str, backend: str, dtype: str
) -> None:
    """The same tokens, though the last chunks are 1 and 31 tokens long and steps replay graphs.

    A last chunk of one token looks like a decode step; its query must be collected all the same.
    """
    prompts = [prose[:193], prose[300:459]]
    tokens = 4 if backend == "TRITON_ATTN" else 12
    settings: dict[str, Any] = {
        "block_size": 32,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    reference = engines.open(model=model(backend), **{**settings, "max_num_batched_tokens": 512})
    kept = reference.record_kept()
    outputs = reference.generate(prompts, tokens, **setting(method, 96))
    job = {"prompts": prompts, "max_tokens": tokens, "method": method, "budget": 96}
    settings["kv_cache_dtype"] = dtype
    result = run(backend, **job, settings=settings, graphs=GRAPHS, warm_up=True)
    assert result["stats"]["prompt_cuts"] == len(result["kept"]) == 2
    assert result["replayed"] > 0
    # No request waits for a compiler.
    assert result["warm"]
    assert result["launched"] == result["warm"]
    if dtype == "auto":
        assert sorted(result["kept"]) == sorted(kept)
        assert result["outputs"] == [outputs]
        return
    # Eight bits move some scores across the threshold: 5 of 576 tokens at most. At random it would
    # be half.
    assert agreement(sorted(result["kept"]), sorted(kept)) >= 0.98


def test_cuts_within_a_step_and_while_generating(
    run: Run, engines: Engines, prose: list[int]
) -> None:
    """A cascade, and then cuts by queries that replayed graphs have put aside."""
    prompts = [prose[:193], prose[300:459], prose[500:520]]
    settings: dict[str, Any] = {
        "block_size": 32,
        "max_num_batched_tokens": 512,
        "max_model_len": 256,
    }
    config = {"prefill": "cascade", "decode_budget": 96, "decode_buffer": 32}
    reference = engines.get("cake", 96, model=model("FLASH_ATTN"), config=config, **settings)
    kept = reference.record_kept()
    outputs = reference.generate(prompts, 40)
    assert reference.stats["prefills_cascade"] == 2
    result = run(
        "FLASH_ATTN",
        prompts=prompts,
        max_tokens=40,
        method="cake",
        budget=96,
        config=config,
        settings=settings,
        graphs=GRAPHS,
        warm_up=True,
    )
    assert result["replayed"] > 30
    assert result["stats"]["prompt_cuts"] == 2
    assert result["stats"]["decode_cuts"] == 2
    assert sorted(result["kept"]) == sorted(kept)
    assert len(kept) == 4
    assert result["outputs"] == [outputs]
    assert set(result["launched"]) <= set(result["warm"]), "a request waits for a compiler"


def fp8_scales(layers: int) -> tuple[tuple[float, ...], ...]:
    """Scales of queries, keys and values that no two layers share."""
    return tuple(
        tuple(first * (1 + layer / 4) for layer in range(layers)) for first in (0.07, 0.11, 0.013)
    )


def test_fp8_queries_and_scales_are_the_numbers_they_stand_for(run: Run, prose: list[int]) -> None:
    """What is kept by cuts of prompts and while generating, from FP8 and from those numbers."""
    layers = LAYERS["FLASH_ATTN"]
    plain, scales = first_layers(MODELS / SMALL, layers), fp8_scales(layers)
    job: dict[str, Any] = {
        "prompts": [prose[:193], prose[300:459]],
        "max_tokens": 40,
        "method": "cake",
        "budget": 96,
        "config": {"decode_budget": 96, "decode_buffer": 32},
        "settings": {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 256},
        "graphs": GRAPHS,
    }
    # The checkpoint asks for an FP8 cache.
    quantized = run("FLASH_ATTN", **job, model=str(with_fp8_cache(plain, scales)))
    meant = run("FLASH_ATTN", **job, model=str(plain), rounded=scales)
    assert quantized["stats"]["prompt_cuts"] == quantized["stats"]["decode_cuts"] == 2
    assert sorted(quantized["kept"]) == sorted(meant["kept"])
    assert quantized["outputs"] == meant["outputs"]


def test_fp8_with_a_decode_budget_under_triton(run: Run, prose: list[int]) -> None:
    """The same where attention also rounds its weights: layers agree up to the first output."""
    layers = LAYERS["TRITON_ATTN"]
    plain, scales = first_layers(MODELS / SMALL, layers), fp8_scales(layers)
    job: dict[str, Any] = {
        "prompts": [prose[:70]],
        "max_tokens": 18,
        "method": "snapkv",
        "budget": 48,
        "config": {"window": 8, "decode_budget": 48, "decode_buffer": 16},
        "settings": {"block_size": 16, "max_num_batched_tokens": 64, "max_model_len": 128},
        "graphs": [1],
    }
    quantized = run("TRITON_ATTN", **job, model=str(with_fp8_cache(plain, scales)))
    meant = run("TRITON_ATTN", **job, model=str(plain), rounded=scales)
    assert quantized["stats"]["prompt_cuts"] == quantized["stats"]["decode_cuts"] == 1
    # The first layer of the prompt's cut has the same keys and queries to the last bit.
    assert quantized["kept"][0][0] == meant["kept"][0][0]
    # At random it would be two thirds.
    assert agreement(quantized["kept"], meant["kept"]) >= 0.95

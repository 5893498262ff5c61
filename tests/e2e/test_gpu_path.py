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

from tests.e2e.cut_model import first_layers
from tests.e2e.engine import setting
from tests.e2e.harness import MODELS, SMALL, Engines
from tests.e2e.interpreted import Interpreted

pytestmark = pytest.mark.engine

LIMIT = 600
SETTINGS = {"block_size": 16, "max_num_batched_tokens": 64, "max_model_len": 512}
GRAPHS = [1, 2, 4]
TOKENS = {"TRITON_ATTN": 6, "FLASH_ATTN": 14}
LAYERS = {"TRITON_ATTN": 2, "FLASH_ATTN": 4}
KERNELS = {
    "cake": {
        *("row_sums", "combine", "columns", "_totals", "_token_scores_kernel", "_select_kernel"),
        *("_move_tokens", "_pack_tokens", "_fill"),
    }
}
KERNELS["dynamickv"] = {
    *KERNELS["cake"],
    *("_background_kernel", "_layer_histogram_kernel", "_layer_threshold_kernel"),
}

Run = Callable[..., dict[str, Any]]


def model(backend: str) -> str:
    """The small model's first layers, as many as the backend has time for."""
    return str(first_layers(MODELS / SMALL, LAYERS[backend]))


@pytest.fixture
def run(v2: Interpreted) -> Run:
    """Run one engine with a GPU's attention."""

    def once(backend: str, **job: Any) -> dict[str, Any]:
        return v2.run(LIMIT, **{"settings": SETTINGS, **job}, backend=backend, model=model(backend))

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
    assert {variant.split()[0] for variant in result["warm"]} == KERNELS[method]
    assert result["launched"] == result["warm"]
    if dtype == "auto":
        assert sorted(result["kept"]) == sorted(kept)
        assert result["outputs"] == [outputs]
        return
    for found, wanted in zip(sorted(result["kept"]), sorted(kept), strict=True):
        same = sum(
            len(set(f) & set(w))
            for layer_found, layer_wanted in zip(found, wanted, strict=True)
            for f, w in zip(layer_found, layer_wanted, strict=True)
        )
        # Eight-bit keys move some scores across the threshold. At random it would be half.
        assert same >= 0.75 * sum(len(head) for layer in wanted for head in layer)


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

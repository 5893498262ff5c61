"""docs/compatibility.md: tests that it names exist, and the code says the sentences it quotes.

Every refusal of the page is proved here, and nowhere else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm import platforms
from vllm.config import CUDAGraphMode, KVTransferConfig, ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tests.support.compatibility_page import REFUSED, ROOT, UNTESTED, WORKS, Row, refusals, rows
from tests.support.fake_cuda import become_cuda
from tests.support.refusals import (
    FP8_CACHE,
    GEMMA3,
    LLAMA,
    REFUSED_MODELS,
    SHAPE,
    Layer,
    gpu_config,
    plain_config,
    refused_layer,
    start,
)
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.backend_choice import check_backends
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.layer_checks import check_specs
from vllm_kvcompress.engine.requests import check_request
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

Cases = Iterator[tuple[str, Callable[[], object]]]
"""A refused feature of the page, and a call that is refused because of it."""


@cache
def functions(path: str) -> frozenset[str]:
    """Names of the tests of a file, which is read and not run."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature[:40])
def test_a_row_has_a_state_and_what_shows_it(row: Row) -> None:
    assert row.state in (WORKS, REFUSED, UNTESTED)
    named = re.findall(r"tests/[\w/.]+", row.evidence)
    assert len(named) == len(row.tests), "tests are named as `path::name`"
    missing = [f"{path}::{name}" for path, name in row.tests if name not in functions(path)]
    assert missing == []
    assert row.tests or row.state != WORKS
    assert row.quote or row.state != REFUSED


def test_no_feature_is_listed_twice() -> None:
    features = [row.feature for row in rows()]
    assert len(features) == len(set(features))


def test_a_refusal_is_one_sentence() -> None:
    for sentence in refusals().values():
        assert 20 < len(sentence) < 300, sentence
        assert "Error" not in sentence, sentence
    assert len(set(refusals().values())) == len(refusals())


# --- sentences -----------------------------------------------------------------------------------


def configs(root: Path, patch: pytest.MonkeyPatch) -> Cases:
    """Models and options, as a user gives them."""
    for feature, models in REFUSED_MODELS.items():
        for model in models:
            yield feature, partial(start, root, model=model)
    pooling = "embedding, classification and other pooling models"
    yield pooling, partial(start, root, runner="pooling", convert="embed")
    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    options: list[tuple[str, dict[str, Any]]] = [
        (
            "KV connectors: offloading, disaggregated prefill, LMCache",
            {"kv_transfer_config": connector},
        ),
        ("KV connectors: offloading, disaggregated prefill, LMCache", {"kv_offloading_size": 1.0}),
        ("speculative decoding", {"speculative_config": ngram}),
        ("tensor and pipeline parallelism", {"tensor_parallel_size": 2}),
        ("tensor and pipeline parallelism", {"pipeline_parallel_size": 2}),
        ("FP8 KV cache on the CPU", {"kv_cache_dtype": "fp8"}),
        ("FP8 KV cache on the CPU", {"model": FP8_CACHE}),
        ("block sizes that attention's kernels cannot read", {"block_size": 24}),
        ("head sizes that CPU_ATTN has no kernel for", {"model": {**LLAMA, "head_dim": 16}}),
        ("other quantized KV caches", {"kv_cache_dtype": "fp8_e5m2"}),
        (
            "FlashInfer, FlexAttention, ROCm's and all other backends",
            {"attention_backend": "FLASHINFER"},
        ),
        ("workers of other platforms, custom workers", {"worker_cls": "my.Worker"}),
        ("custom scheduler", {"scheduler_cls": "my.Scheduler"}),
        (
            "the same without vLLM's hybrid KV cache manager",
            {"model": GEMMA3, "disable_hybrid_kv_cache_manager": True},
        ),
        (
            "the same, compressed while a prompt runs",
            {"model": GEMMA3, "settings": {"method": "cake", "prefill": "cascade"}},
        ),
    ]
    for feature, given in options:
        yield feature, partial(start, root, **given)
    with patch.context() as other:
        other.setattr(vllm, "__version__", "0.31.2")
        yield "another vLLM", partial(start, root)
    with patch.context() as other:
        other.setattr(ModelConfig, "is_mm_prefix_lm", property(lambda _: True))
        yield "images that see later tokens", partial(start, root)


def devices(root: Path, patch: pytest.MonkeyPatch) -> Cases:
    """Settings that vLLM itself refuses on this machine, in finished configurations."""
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        config = plain_config(root)
        setattr(config.parallel_config, field, 2)
        yield "context parallelism, of decode or prefill", partial(checks.check_config, config)
    with patch.context() as gpu:
        config = gpu_config(root, gpu)
        refused = partial(checks.check_config, config)
        config.attention_config.backend = AttentionBackendEnum.FLASHINFER
        yield "FlashInfer, FlexAttention, ROCm's and all other backends", refused
        config.attention_config.backend = None
        config.attention_config.backend_per_kind = {
            "sliding_window": AttentionBackendEnum.FLASHINFER,
            "full_attention": AttentionBackendEnum.FLASHINFER,
        }
        yield "the same for full-attention layers alone", refused
        config.attention_config.backend_per_kind.pop("full_attention")
        config.cache_config.cache_dtype = "fp8"
        config.quant_config = SimpleNamespace(kv_cache_scheme={"strategy": "attn_head"})
        yield "FP8 KV cache with one scale per head", refused
        config.quant_config = SimpleNamespace(kv_cache_scheme={"strategy": "tensor"})
        with gpu.context() as amd:
            amd.setattr(type(platforms.current_platform), "is_fp8_fnuz", lambda self: True)
            yield (
                "FP8 KV cache on an AMD GPU with numbers of its own",
                partial(check_backends, config),
            )
        become_cuda(gpu, (8, 6))
        yield "FP8 KV cache on GPUs before compute capability 8.9", partial(check_backends, config)
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
        yield "FULL graphs of mixed batches", refused
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.parallel_config.enable_dbo = True
        yield "dual batch overlap", refused
        config.parallel_config.enable_dbo = False
        gpu.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        yield "model runner V1 on a GPU", refused


def layer_with(**attributes: Any) -> Layer:
    """An attention layer that has these attributes."""
    layer = Layer()
    for name, value in attributes.items():
        setattr(layer.impl, name, value)
    return layer


def layers() -> Cases:
    """Layers that are found to be wrong once the model has been made."""
    same = ArenaSpec(**SHAPE)
    larger = {**SHAPE, "head_size": 128}
    quantized = "single layers with a quantized KV cache that attention cannot read"
    yield "a layer with another backend than the rest", refused_layer(same, Layer(object))
    yield quantized, refused_layer(same, layer_with(kv_cache_dtype="fp8"))
    yield "ALiBi in a layer", refused_layer(same, layer_with(alibi_slopes=torch.ones(4)))
    yield (
        "layers with different numbers of query heads",
        refused_layer(same, layer_with(num_heads=8)),
    )
    yield "layers that see later tokens", refused_layer(ArenaSpec(**SHAPE, non_causal=True))
    yield (
        "sliding-window layers with pages of another size",
        refused_layer(SlidingWindowSpec(**larger, sliding_window=128)),
    )
    yield (
        "layers with different KV heads, head sizes or dtypes",
        refused_layer(ArenaSpec(**larger)),
    )
    reader = Layer()
    setattr(reader, "kv_sharing_target_layer_name", "layers.0")  # noqa: B010
    yield (
        "layers that share KV caches (Gemma 3n)",
        lambda: check_specs(
            {"layers.0": same}, {"layers.0": Layer(), "layers.1": reader}, ArenaCPUImpl
        ),
    )
    alone: dict[str, KVCacheSpec] = {"layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128)}
    yield (
        "layers that see neither the whole context nor a sliding window beside it",
        lambda: check_specs(alone, {"layers.0": Layer()}, ArenaCPUImpl),
    )


def requests(root: Path) -> Cases:
    yield (
        "input that is streamed into a running request",
        lambda: check_request(SimpleNamespace(resumable=True, sampling_params=None), None),
    )
    config = start(root, settings={"method": "uniform", "budget": 400}, block_size=32)
    config.cache_config.block_size = 100
    config.cache_config.num_gpu_blocks = 9  # one of them is the null block
    config.model_config.max_model_len = 2000
    request = SimpleNamespace(
        resumable=False,
        prompt_token_ids=[0] * 400,
        sampling_params=SimpleNamespace(extra_args=None, max_tokens=900),
    )
    yield (
        "answers longer than the pool has room for",
        lambda: check_request(request, config),
    )


def test_the_code_says_what_is_quoted_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: set[int] = set()
    all_rules = 0
    original = checks._rules

    def recording(config: VllmConfig) -> list[checks.Rule]:
        nonlocal all_rules
        found = original(config)
        all_rules = max(all_rules, len(found))
        heard.update([i for i, (applies, _, _) in enumerate(found) if applies][:1])
        return found

    monkeypatch.setattr(checks, "_rules", recording)
    quoted, proved = refusals(), set()
    for cases in (configs(root, monkeypatch), devices(root, monkeypatch), layers(), requests(root)):
        for feature, refused in cases:
            with pytest.raises((ValueError, VLLMValidationError)) as caught:
                refused()
            assert str(caught.value) == quoted.get(feature), feature
            proved.add(feature)
    assert set(quoted) - proved == set(), "quoted, but nothing says so"
    unheard = set(range(all_rules)) - heard
    assert unheard == set(), "a rule of checks.py has no line here and none on the page"


@pytest.mark.parametrize(
    "spec",
    [
        ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=128),
        ArenaSpec(**SHAPE, sliding_window=128),
        ArenaSpec(**SHAPE, attention_chunk_size=128),
        FullAttentionSpec(**SHAPE),
        MLAAttentionSpec(**SHAPE),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_layers_of_every_other_kind_are_refused(spec: KVCacheSpec) -> None:
    quote = refusals()["layers that see neither the whole context nor a sliding window beside it"]
    kind = f"layers.1 does not attend to the whole context ({type(spec).__name__})"
    sentence = quote.replace(
        "layers.0 does not attend to the whole context (SlidingWindowSpec)", kind
    )
    assert sentence != quote
    with pytest.raises(checks.Unsupported) as caught:
        refused_layer(spec)()
    assert str(caught.value) == sentence


def test_the_first_layer_is_checked_too() -> None:
    specs: dict[str, KVCacheSpec] = {"layers.0": ArenaSpec(**SHAPE, non_causal=True)}
    with pytest.raises(checks.Unsupported) as caught:
        check_specs(specs, {"layers.0": Layer()}, ArenaCPUImpl)
    later = refusals()["layers that see later tokens"]
    assert str(caught.value) == later.replace("layers.1", "layers.0")

"""Layers that cannot share an arena are refused once the model has made them."""

from __future__ import annotations

import pytest
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tests.support.refusals import SHAPE, Layer, check_sentence, refused_layer
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec


def test_equal_full_attention_layers_are_accepted() -> None:
    specs: dict[str, KVCacheSpec] = {f"layers.{i}": ArenaSpec(**SHAPE) for i in range(3)}
    checks.check_specs(specs, {name: Layer() for name in specs}, ArenaCPUImpl)


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
def test_layers_that_do_not_see_the_whole_context(spec: KVCacheSpec) -> None:
    error = refused_layer(spec)
    check_sentence(error, "layers.1", type(spec).__name__, "sliding-window", "drop the flag")


def test_sliding_windows_beside_full_attention_are_accepted() -> None:
    specs = {
        "layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128),
        "layers.1": ArenaSpec(**SHAPE),
    }
    # They stay as they are, so it does not matter what attention they have.
    layers = {"layers.0": Layer(object), "layers.1": Layer()}
    checks.check_specs(specs, layers, ArenaCPUImpl)


def test_a_model_of_sliding_windows_alone() -> None:
    specs: dict[str, KVCacheSpec] = {"layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128)}
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_specs(specs, {"layers.0": Layer()}, ArenaCPUImpl)
    check_sentence(caught.value, "layers.0", "SlidingWindowSpec", "drop the flag")


def test_sliding_windows_with_other_pages() -> None:
    error = refused_layer(SlidingWindowSpec(**{**SHAPE, "head_size": 128}, sliding_window=128))
    check_sentence(error, "layers.1", "pages of another size", "layers.0", "drop the flag")


def test_layers_of_another_shape() -> None:
    error = refused_layer(ArenaSpec(**{**SHAPE, "head_size": 128}))
    check_sentence(error, "layers.1", "another KV-cache shape", "drop --kv-compression")


def test_layers_of_another_backend() -> None:
    error = refused_layer(ArenaSpec(**SHAPE), Layer(object))
    check_sentence(error, "layers.1", "attention object", "set --attention-backend")


def test_layers_that_see_later_tokens() -> None:
    specs: dict[str, KVCacheSpec] = {"layers.0": ArenaSpec(**SHAPE, non_causal=True)}
    with pytest.raises(checks.Unsupported) as caught:
        checks.check_specs(specs, {"layers.0": Layer()}, ArenaCPUImpl)
    check_sentence(caught.value, "layers.0", "drop")

"""What the worker finds out about vLLM at start: where pages lie, and which runner it drives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.checks import Unsupported, check_specs
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.worker.arena_worker import flat_view
from vllm_kvcompress.engine.worker.cpu_worker import ArenaCPUWorker

LAYERS, BLOCKS, HEADS, SIZE, WIDTH = 3, 5, 2, 4, 6


def pool(block_outermost: bool) -> list[torch.Tensor]:
    """Per layer [BLOCKS, HEADS, SIZE, WIDTH] in one allocation of distinct numbers."""
    outer = (BLOCKS, LAYERS) if block_outermost else (LAYERS, BLOCKS)
    whole = torch.arange(LAYERS * BLOCKS * HEADS * SIZE * WIDTH, dtype=torch.float32)
    whole = whole.view(*outer, HEADS, SIZE, WIDTH)
    return list(whole.unbind(1 if block_outermost else 0))


@pytest.mark.parametrize("block_outermost", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_every_page_is_where_the_geometry_says(
    block_outermost: bool, order: tuple[int, ...]
) -> None:
    base = pool(block_outermost)
    caches = [base[layer] for layer in order]
    flat, geometry = flat_view(caches)
    assert (geometry.num_layers, geometry.num_blocks, geometry.block_size) == (LAYERS, BLOCKS, SIZE)
    seen = set()
    for layer, cache in enumerate(caches):
        for block in range(BLOCKS):
            (page,) = geometry.pages(layer, [block]).tolist()
            assert torch.equal(flat[page], cache[block])
            assert flat[page].data_ptr() == cache[block].data_ptr()
            seen.add(page)
    assert seen == set(range(LAYERS * BLOCKS))


def test_layers_in_allocations_of_their_own_are_refused() -> None:
    caches = [torch.zeros(BLOCKS, HEADS, SIZE, WIDTH) for _ in range(LAYERS)]
    with pytest.raises(ValueError, match=r"^this KV-cache layout is not supported .*unset"):
        flat_view(caches)


def test_pages_with_heads_outside_are_refused() -> None:
    whole = torch.zeros(HEADS, LAYERS, BLOCKS, SIZE, WIDTH)
    caches = [whole[:, layer].transpose(0, 1) for layer in range(LAYERS)]
    with pytest.raises(ValueError, match="KV-cache layout is not supported"):
        flat_view(caches)


def test_pages_with_tokens_outside_heads_are_found_too() -> None:
    """The order in which CUDA backends store a page."""
    whole = torch.arange(LAYERS * BLOCKS * HEADS * SIZE * WIDTH, dtype=torch.float32)
    stored = whole.view(LAYERS, BLOCKS, SIZE, HEADS, WIDTH)
    caches = [stored[layer].transpose(1, 2) for layer in range(LAYERS)]
    flat, geometry = flat_view(caches)
    assert flat.shape[1:] == (HEADS, SIZE, WIDTH)
    for layer in range(LAYERS):
        (page,) = geometry.pages(layer, [2]).tolist()
        assert torch.equal(flat[page], caches[layer][2])


def test_another_model_runner_is_refused() -> None:
    worker = ArenaCPUWorker.__new__(ArenaCPUWorker)
    worker.model_runner = object()
    worker._session = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model runner object is not supported .* V1 or V2$"):
        worker._follow_runner()


def layer(**facts: Any) -> SimpleNamespace:
    """An attention layer with our implementation, of which only some facts are set."""
    impl = ArenaCPUImpl.__new__(ArenaCPUImpl)
    usual = {"alibi_slopes": None, "num_heads": 4, "kv_cache_dtype": "auto"}
    for name, value in {**usual, **facts}.items():
        setattr(impl, name, value)
    return SimpleNamespace(impl=impl)


def test_layers_that_cannot_be_scored_or_attended_rightly_are_refused() -> None:
    spec = ArenaSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    specs: dict[str, KVCacheSpec] = {"first": spec, "second": spec}
    check_specs(specs, {"first": layer(), "second": layer()}, ArenaCPUImpl)
    slopes = torch.ones(4)
    with pytest.raises(Unsupported, match=r"^layer second uses ALiBi, .* drop the flag"):
        check_specs(specs, {"first": layer(), "second": layer(alibi_slopes=slopes)}, ArenaCPUImpl)
    with pytest.raises(Unsupported, match=r"^layer second has a KV cache of dtype fp8"):
        check_specs(specs, {"first": layer(), "second": layer(kv_cache_dtype="fp8")}, ArenaCPUImpl)
    with pytest.raises(Unsupported, match=r"^layer second has another number of query heads \(8\)"):
        check_specs(specs, {"first": layer(), "second": layer(num_heads=8)}, ArenaCPUImpl)

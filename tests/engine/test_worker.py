"""What the worker finds out about vLLM at start: where pages lie, and which runner it drives."""

import pytest
import torch

from vllm_kvcompress.engine.worker.arena_worker import flat_view
from vllm_kvcompress.engine.worker.cpu_worker import ArenaCPUWorker

LAYERS, BLOCKS, HEADS, SIZE, WIDTH = 3, 5, 2, 4, 6


def pool(block_outermost: bool, tokens_first: bool) -> list[torch.Tensor]:
    """Per layer [BLOCKS, HEADS, SIZE, WIDTH] in one allocation of distinct numbers."""
    outer = (BLOCKS, LAYERS) if block_outermost else (LAYERS, BLOCKS)
    whole = torch.arange(LAYERS * BLOCKS * HEADS * SIZE * WIDTH, dtype=torch.float32)
    if tokens_first:  # within a page, as CUDA backends have it
        whole = whole.view(*outer, SIZE, HEADS, WIDTH).transpose(2, 3)
    else:
        whole = whole.view(*outer, HEADS, SIZE, WIDTH)
    return list(whole.unbind(1 if block_outermost else 0))


@pytest.mark.parametrize("block_outermost", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_every_page_is_where_the_geometry_says(
    block_outermost: bool, tokens_first: bool, order: tuple[int, ...]
) -> None:
    base = pool(block_outermost, tokens_first)
    caches = [base[layer] for layer in order]
    flat, geometry = flat_view(caches)
    assert flat.shape[1:] == (HEADS, SIZE, WIDTH)
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


def test_another_model_runner_is_refused() -> None:
    worker = ArenaCPUWorker.__new__(ArenaCPUWorker)
    worker.model_runner = object()
    worker._session = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model runner object is not supported .* V1 or V2$"):
        worker._follow_runner()

"""Pages as CUDA backends store them, through the torch twins of the kernels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompress_kernels.page_tables import StepTables
from kvcompress_kernels.scoring import window_statistics
from vllm_kvcompress.paging import strided_codec
from vllm_kvcompress.paging.attention_layer import AttentionParams, attention_params
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.strided_codec import OBSERVED_BYTES, SHARED_BYTES, StridedPageCodec
from vllm_kvcompress.planning.workspace_memory import ModelShape, table_bytes, transient_bytes

PAGES, HEADS, SIZE, DIM, WINDOW = 12, 2, 16, 32, 8
FACTS = AttentionParams(scale=DIM**-0.5, soft_cap=0.0, sinks=None)


def pool(order: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random tokens, logical [PAGES, HEADS, SIZE, 2 * DIM]."""
    generator = torch.Generator().manual_seed(1)
    inner = (HEADS, SIZE) if order == "HND" else (SIZE, HEADS)
    cache = torch.randn((PAGES, *inner, 2 * DIM), generator=generator).to(dtype)
    return cache if order == "HND" else cache.transpose(1, 2)


def tokens_of(cache: Tensor, pages: list[int]) -> Tensor:
    """All tokens of some pages in order, [HEADS, n * SIZE, 2 * DIM]."""
    return cache[pages].transpose(0, 1).reshape(HEADS, -1, 2 * DIM)


def bytes_of(cache: Tensor, pages: list[int]) -> Tensor:
    """The same of a pool viewed as bytes."""
    return cache[pages].transpose(0, 1).reshape(HEADS, len(pages) * SIZE, -1)


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_of_all_layers_are_moved_and_nothing_else(order: str, dtype: torch.dtype) -> None:
    cache = pool(order, dtype)
    before = cache.clone()
    codec = StridedPageCodec(cache, "auto", dtype, implementation="torch")
    assert (codec.num_kv_heads, codec.head_size, codec.block_size) == (HEADS, DIM, SIZE)
    sources = [np.array([4, 0, 7]), np.array([1, 9, 2])]
    targets = [np.array([3, 11]), np.array([5])]
    kept = [
        torch.tensor(
            [sorted(np.random.default_rng(head).permutation(40)[:count]) for head in (0, 1)]
        )
        for count in (2 * SIZE, SIZE - 3)
    ]
    codec.move(sources, kept, targets)
    for source, ids, target in zip(sources, kept, targets, strict=True):
        had, has = tokens_of(before, source.tolist()), tokens_of(cache, target.tolist())
        for head in range(HEADS):
            assert torch.equal(has[head, : ids.shape[1]], had[head, ids[head]])
    others = [0, 1, 2, 4, 6, 7, 8, 9, 10]
    assert torch.equal(cache[others], before[others])
    assert torch.equal(cache[5][:, SIZE - 3 :], before[5][:, SIZE - 3 :])


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "target",
    [[4, 0], [0, 4], [7, 4, 0], [11, 4], [3, 10]],
    ids=["in place", "swapped", "turned", "one of its own", "elsewhere"],
)
def test_a_layer_is_rewritten_over_its_own_pages(
    order: str, dtype: torch.dtype, target: list[int]
) -> None:
    # Compared as bytes: not every number of an FP8 cache equals itself.
    cache = pool(order, dtype)
    before = cache.view(torch.uint8).clone()
    fp8 = dtype == torch.float8_e4m3fn
    codec = StridedPageCodec(
        cache.view(torch.uint8) if fp8 else cache,
        "fp8" if fp8 else "auto",
        torch.bfloat16 if fp8 else dtype,
        implementation="torch",
    )
    source = [4, 0, 7]
    # The last page is not filled, and tokens come in whatever order.
    count = len(target) * SIZE - 3
    kept = torch.stack([torch.randperm(3 * SIZE)[:count] for _ in range(HEADS)])
    codec.rewrite(np.array(source), kept, np.array(target))

    now = cache.view(torch.uint8)
    had, has = bytes_of(before, source), bytes_of(now, target)
    for head in range(HEADS):
        assert torch.equal(has[head, :count], had[head, kept[head]])
    others = [page for page in range(PAGES) if page not in target]
    assert torch.equal(now[others], before[others])
    assert torch.equal(now[target[-1]][:, -3:], before[target[-1]][:, -3:])


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("most", [1, 3, 100], ids="at most {} pages at a time".format)
def test_a_cascade_is_settled_as_layer_by_layer(
    order: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = pool(order)
    monkeypatch.setattr(strided_codec, "SETTLED_BYTES", most * cache[0].numel() * 4)
    codec = StridedPageCodec(cache, "auto", torch.float32, implementation="torch")
    tables = [np.array(pages) for pages in ([4, 0], [7], [1, 9, 2], [11, 3])]
    orders = [
        torch.stack([torch.randperm(len(pages) * SIZE) for _ in range(HEADS)]) for pages in tables
    ]
    codec.settle(tables, orders)
    for pages, ids in zip(tables, orders, strict=True):
        had, has = tokens_of(pool(order), pages.tolist()), tokens_of(cache, pages.tolist())
        for head in range(HEADS):
            assert torch.equal(has[head], had[head, ids[head]])
    others = [page for page in range(PAGES) if page not in np.concatenate(tables)]
    assert torch.equal(cache[others], pool(order)[others])


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_keys_are_read_and_whole_pages_copied(order: str) -> None:
    cache = pool(order)
    codec = StridedPageCodec(cache, "auto", torch.float32, implementation="torch")
    keys = codec.read_keys(np.array([6, 2]), 20)
    assert torch.equal(keys, tokens_of(cache, [6, 2])[:, :20, :DIM])
    codec.copy(np.array([6, 2]), np.array([0, 1]))
    assert torch.equal(cache[[0, 1]], pool(order)[[6, 2]])
    assert torch.equal(cache[2:], pool(order)[2:])


def test_statistics_of_several_layers_are_those_of_each() -> None:
    cache = pool("NHD")
    codec = StridedPageCodec(cache, "auto", torch.float32, implementation="torch")
    windows = torch.randn(2, WINDOW, 2 * HEADS, DIM)
    sources = [np.array([4, 0, 7]), np.array([1, 9, 2])]
    facts = [FACTS, AttentionParams(scale=0.5, soft_cap=0.0, sinks=None)]
    # After cuts that left them different numbers of pages, layers differ in length.
    lengths = [41, 29]
    statistics = codec.observe(windows, codec.open(sources, lengths), facts)
    found = [statistics.job(layer) for layer in range(2)]
    for layer, (source, fact) in enumerate(zip(sources, facts, strict=True)):
        expected = window_statistics(
            windows[layer].transpose(0, 1),
            tokens_of(cache, source.tolist())[:, : lengths[layer], :DIM],
            window=WINDOW,
            scale=fact.scale,
        )
        assert found[layer].mean.shape[-1] == lengths[layer] - WINDOW
        torch.testing.assert_close(found[layer].mean, expected.mean)
        torch.testing.assert_close(found[layer].var, expected.var)
        assert float(found[layer].entropy) == pytest.approx(float(expected.entropy), rel=1e-6)


def test_an_fp8_cache_arrives_as_bytes_and_keeps_its_scale_outside() -> None:
    numbers = pool("NHD", torch.float8_e4m3fn)
    codec = StridedPageCodec(
        numbers.view(torch.uint8), "fp8", torch.bfloat16, implementation="torch"
    )
    keys = codec.read_keys(np.array([3]), SIZE)
    assert keys.dtype == torch.bfloat16
    assert torch.equal(keys, tokens_of(numbers.to(torch.bfloat16), [3])[..., :DIM])


def test_a_scale_holds_for_the_numbers_that_are_stored() -> None:
    def layer(**facts: Any) -> Any:
        impl = SimpleNamespace(scale=0.125, logits_soft_cap=None, sinks=None)
        return SimpleNamespace(impl=impl, **facts)

    quantized = layer(_k_scale_float=0.5, _q_scale_float=2.0, query_quant=None)
    assert attention_params(quantized, "auto").scale == 0.125
    assert attention_params(quantized, "fp8").scale == 0.0625
    quantized.query_quant = object()
    assert attention_params(quantized, "fp8_e4m3").scale == 0.125


def test_sinks_are_numbers_whatever_a_model_hands_out() -> None:
    """That of gpt-oss requires gradients; an operator with ``out=`` would refuse it."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    impl = SimpleNamespace(scale=0.125, logits_soft_cap=None, sinks=parameter)
    for dtype in (torch.bfloat16, torch.float32):
        impl.sinks = torch.nn.Parameter(parameter.detach().to(dtype))
        sinks = attention_params(SimpleNamespace(impl=impl), "auto").sinks
        assert sinks is not None
        assert type(sinks) is torch.Tensor
        assert not sinks.requires_grad
        assert sinks.tolist() == [1.0, -2.0]


def test_warming_up_writes_nothing() -> None:
    cache = pool("NHD")
    codec = StridedPageCodec(cache, "auto", torch.float32, implementation="torch")
    codec.warm_up()
    assert torch.equal(cache, pool("NHD"))


def test_tokens_in_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        StridedPageCodec(pool("HND")[..., ::2], "auto", torch.float32)


def test_memory_set_aside_is_what_the_buffers_take() -> None:
    shape = ModelShape(layers=3, heads=4, kv_heads=HEADS, head_size=DIM, itemsize=2)
    limits = TableLimits(rows=5, width=17, tokens=63)
    # Rounded up, so that every layer's begin at a multiple of 16 bytes.
    tables = StepTables.allocate(3, 8, 17, 64, device=torch.device("cpu"))
    buffers = (tables.block_tables, tables.seq_lens, tables.slot_mapping)
    assert table_bytes(shape, limits) == sum(b.numel() * b.element_size() for b in buffers)
    small = transient_bytes(shape, max_model_len=1000, window=8, most_kept=100)
    large = transient_bytes(shape, max_model_len=9000, window=8, most_kept=100)
    # Scores of several prompts take as much as those of a long one, which count twice.
    assert large == small
    larger = transient_bytes(shape, max_model_len=2 * 10**7, window=8, most_kept=100)
    statistics = 2 * 4 * shape.heads * 2 * 10**7 - OBSERVED_BYTES
    scores = 2 * 4 * 3 * HEADS * 2 * 10**7 - SHARED_BYTES
    assert larger - small == statistics + scores

"""The page codec on every instruction set, dtype, block and head size this machine can run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from vllm_kvcompress.engine.attention.cpu_codec import CpuPageCodec

PAGES, HEADS = 7, 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Case = tuple[str, torch.dtype, int, int]


def cases() -> list[Case]:
    """What vLLM itself would choose here, and its portable instruction sets besides."""
    found: set[Case] = set()
    for dtype in DTYPES:
        for block_size in (32, 64, 128):
            for head_size in CPUAttentionBackend.get_supported_head_sizes():
                found.add(
                    (_get_attn_isa(dtype, block_size, head_size), dtype, block_size, head_size)
                )
        if not torch.cpu._is_avx2_supported():
            continue
        # An x86 machine without AMX chooses these; vec16 is also for odd head sizes.
        found.update(("vec", dtype, size, head) for size in (32, 96) for head in (32, 64, 128))
        found.update(("vec16", dtype, size, head) for size in (16, 48) for head in (64, 80))
    return sorted(found, key=str)


def name(case: Case) -> str:
    isa, dtype, block_size, head_size = case
    return f"{isa}-{str(dtype).removeprefix('torch.')}-{block_size}-{head_size}"


every_case = pytest.mark.parametrize("case", cases(), ids=name)
# One per instruction set and dtype, where the order within a page does not matter any more.
few_cases = pytest.mark.parametrize("case", {c[:2]: c for c in cases()}.values(), ids=name)


def poisoned(case: Case) -> Tensor:
    """A pool of pages full of numbers nobody wrote."""
    _, dtype, block_size, head_size = case
    generator = torch.Generator().manual_seed(1)
    shape = (PAGES, HEADS, block_size, 2 * head_size)
    return torch.randn(shape, generator=generator).to(dtype)


def tokens(case: Case, count: int, seed: int) -> Tensor:
    """Keys or values of some tokens, [N, count, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((HEADS, count, case[3]), generator=generator).to(case[1])


def make(case: Case, cache: Tensor) -> CpuPageCodec:
    return CpuPageCodec(cache, case[0], "auto", case[1])


def store(case: Case, cache: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write tokens as attention does: through vLLM's operator, slot by slot."""
    isa, _, size, head_size = case
    token = torch.arange(keys.shape[1])
    key_cache, value_cache = cache.view(PAGES, HEADS, 2 * size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys.transpose(0, 1).contiguous(),
        values.transpose(0, 1).contiguous(),
        key_cache,
        value_cache,
        pages[token // size] * size + token % size,
        isa,
    )


def values_of(codec: CpuPageCodec, pages: torch.Tensor, count: int) -> torch.Tensor:
    """Values of the first tokens of some pages."""
    keys, values = codec.gather(pages, torch.arange(count).expand(HEADS, -1))
    assert torch.equal(keys, codec.read_keys(pages.numpy(), count))
    return values


@every_case
def test_tokens_that_attention_wrote_are_read_back(case: Case) -> None:
    cache = poisoned(case)
    codec = make(case, cache)
    pages = torch.tensor([5, 0, 3])
    count = 2 * case[2] + 5  # the last page is partly filled
    keys, values = tokens(case, count, 2), tokens(case, count, 3)
    store(case, cache, pages, keys, values)
    assert torch.equal(codec.read_keys(pages.numpy(), count), keys)
    assert torch.equal(values_of(codec, pages, count), values)
    assert torch.equal(codec.read_keys(pages[1:].numpy(), 7), keys[:, case[2] : case[2] + 7])


@every_case
def test_writing_is_what_attention_would_write_and_touches_no_other_page(case: Case) -> None:
    cache, expected = poisoned(case), poisoned(case)
    codec = make(case, cache)
    assert torch.equal(cache, expected)  # the probe uses pages of its own
    pages = torch.tensor([6, 1])
    count = 2 * case[2] - 3
    keys, values = tokens(case, count, 2), tokens(case, count, 3)
    codec.write(pages, keys, values)
    assert torch.equal(codec.read_keys(pages.numpy(), count), keys)
    assert torch.equal(values_of(codec, pages, count), values)
    store(case, expected, pages, keys, values)
    bits = torch.int32 if case[1] is torch.float32 else torch.int16
    assert torch.equal(cache.view(bits), expected.view(bits))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(cache[others].view(bits), poisoned(case)[others].view(bits))


@every_case
def test_copying_moves_whole_pages_and_nothing_else(case: Case) -> None:
    cache, before = poisoned(case), poisoned(case)
    codec = make(case, cache)
    codec.copy(np.array([0, 4]), np.array([2, 6]))
    assert torch.equal(cache[[2, 6]], before[[0, 4]])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(cache[others], before[others])


@few_cases
@pytest.mark.parametrize(
    "target",
    [[5, 0], [0, 5], [3, 5, 0], [4, 5], [6, 1]],
    ids=["in place", "swapped", "turned", "one of its own", "moved"],
)
def test_a_layer_is_rewritten_over_its_own_pages_or_moved(case: Case, target: list[int]) -> None:
    cache = poisoned(case)
    codec = make(case, cache)
    source, size = torch.tensor([5, 0, 3]), case[2]
    keys, values = tokens(case, 3 * size, 2), tokens(case, 3 * size, 3)
    store(case, cache, source, keys, values)
    before = cache.clone()
    # In whatever order: a cascade's survivors lie by worth before and by position afterwards.
    count = len(target) * size
    kept = torch.stack([torch.randperm(3 * size)[:count] for _ in range(HEADS)])
    if set(target).isdisjoint(source.tolist()):
        codec.move([source.numpy()], [kept], [np.array(target)])
    else:
        codec.rewrite(source.numpy(), kept, np.array(target))
    has = values_of(codec, torch.tensor(target), count)
    for head in range(HEADS):
        found = codec.read_keys(np.array(target), count)[head]
        assert torch.equal(found, keys[head, kept[head]])
        assert torch.equal(has[head], values[head, kept[head]])
    others = [page for page in range(PAGES) if page not in target]
    assert torch.equal(cache[others], before[others])


def test_several_layers_move_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = (_get_attn_isa(torch.bfloat16, 32, 64), torch.bfloat16, 32, 64)
    cache = poisoned(case)
    codec = make(case, cache)
    sources = [np.array([5, 0]), np.array([3]), np.array([6, 1])]
    written = [tokens(case, 32 * len(own), seed) for seed, own in enumerate(sources)]
    for own, keys in zip(sources, written, strict=True):
        store(case, cache, torch.from_numpy(own), keys, keys)
    kept = [torch.stack([torch.randperm(keys.shape[1])[:20]] * HEADS) for keys in written]
    targets = [np.array([2]), np.array([4]), np.array([0])]
    calls = []
    monkeypatch.setattr(
        ops, "cpu_attn_reshape_and_cache", lambda *a, **k: calls.append(real_store(*a, **k))
    )
    codec.move(sources, kept, targets)
    assert len(calls) == 1
    for keys, chosen, own in zip(written, kept, targets, strict=True):
        for head in range(HEADS):
            assert torch.equal(codec.read_keys(own, 20)[head], keys[head, chosen[head]])


@few_cases
@pytest.mark.parametrize("at_hand", ["no", "yes", "within queries, keys and values"])
def test_what_a_cascade_holds_ends_as_if_it_had_been_moved(case: Case, at_hand: str) -> None:
    size, dim = case[2], case[3]
    keys, values = tokens(case, 3 * size, 2), tokens(case, 3 * size, 3)
    source, target = np.array([5, 0, 3]), np.array([6, 2])
    found = []
    for cascade in (False, True):
        cache = poisoned(case)
        codec = make(case, cache)
        store(case, cache, torch.from_numpy(source), keys, values)
        kept = torch.stack(
            [torch.randperm(3 * size, generator=torch.Generator().manual_seed(n))[: 2 * size]
             for n in range(HEADS)]
        )  # fmt: skip
        if not cascade:
            codec.move([source], [kept.sort().values], [target])
        else:
            given: list[Tensor] = [] if at_hand == "no" else [keys, values]
            if at_hand.startswith("within"):
                wide = torch.cat([keys, keys, values], dim=0).transpose(0, 1).contiguous()
                parts = wide.view(3 * size, -1).split(HEADS * dim, dim=1)[1:]
                given = [part.view(3 * size, HEADS, dim).transpose(0, 1) for part in parts]
            codec.hold(source, kept, target, *given)
            codec.settle([target], [kept.argsort()])
        found.append(cache)
    assert torch.equal(*found)


def test_a_view_of_a_block_outermost_pool_serves_too() -> None:
    # Pages need not be neighbours: only each one's inside has to be contiguous.
    case: Case = (_get_attn_isa(torch.float32, 32, 32), torch.float32, 32, 32)
    wide = torch.zeros((2 * PAGES, HEADS, 32, 64))
    codec = make(case, wide[::2])
    keys, values = tokens(case, 40, 2), tokens(case, 40, 3)
    codec.write(torch.tensor([4, 1]), keys, values)
    assert torch.equal(codec.read_keys(np.array([4, 1]), 40), keys)
    assert not wide[1::2].any()


real_store: Any = ops.cpu_attn_reshape_and_cache


def lose_everything(*args: Any, **kwargs: Any) -> None:
    """Write nothing at all."""


def lose_values(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    """Write keys right and zeros for values."""
    real_store(key, torch.zeros_like(value), *args, **kwargs)


def lose_a_token(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    """Write token 0 twice, token 1 never."""
    key = key.clone()
    key[1] = key[0]
    real_store(key, value, *args, **kwargs)


def halve_precision(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    """Store rounded numbers, as a cache of few levels would."""
    real_store((key / 4).round() * 4, value, *args, **kwargs)


@pytest.mark.parametrize("broken", [lose_everything, lose_values, lose_a_token, halve_precision])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_that_loses_data_is_noticed(
    broken: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = (_get_attn_isa(dtype, 32, 64), dtype, 32, 64)
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", broken)
    with pytest.raises(RuntimeError, match="cannot read back KV pages") as caught:
        make(case, poisoned(case))
    text = str(caught.value)
    assert case[0] in text
    assert "run without --kv-compression" in text
    assert "\n" not in text

"""The ring of query windows against a dictionary, both ways of indexing it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_kvcompress.eviction.decode_query_buffer import DecodeQueryBuffer

LAYERS, WINDOW, HEADS, DIM = 2, 4, 3, 5
ROWS, TOKENS = 3, 24

both_ways = pytest.mark.parametrize("fixed", [False, True], ids=["cpu", "device"])


def make(fixed: bool) -> DecodeQueryBuffer:
    """A ring on the CPU; ``fixed``: with the index of a device, that every step goes through."""
    query_buffer = DecodeQueryBuffer(
        LAYERS,
        WINDOW,
        HEADS,
        DIM,
        rows=ROWS,
        tokens=TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    query_buffer._in_place = fixed
    return query_buffer


def queries_of(step: int, tokens: int) -> Tensor:
    """Queries [LAYERS, tokens, HEADS, DIM] that tell step, layer and token apart."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(LAYERS, tokens, HEADS, DIM, generator=generator)


def take(
    query_buffer: DecodeQueryBuffer, parts: list[tuple[str, int, range]], queries: Tensor
) -> bool:
    wanted = query_buffer.select(iter(parts))
    if wanted:
        for layer, query in enumerate(queries):
            query_buffer.take(layer, query)
    return wanted


@both_ways
@settings(max_examples=80)
@given(data=st.data())
def test_every_request_finds_the_queries_of_its_own_tokens(
    fixed: bool, data: st.DataObject
) -> None:
    query_buffer = make(fixed)
    expected: dict[str, dict[int, Tensor]] = {}
    for step in range(data.draw(st.integers(1, 8), "steps")):
        for name in data.draw(st.lists(st.sampled_from(sorted(expected) or ["x"]), max_size=2)):
            query_buffer.drop(name)  # at times one that is not there
            expected.pop(name, None)
        parts: list[tuple[str, int, range]] = []
        start = 0
        for name in data.draw(st.permutations(["a", "b", "c", "d"])):
            begin = data.draw(st.integers(0, WINDOW - 1), "first place")
            count = data.draw(st.integers(0, WINDOW - begin), "places")
            # Tokens before and after that nobody needs: of a chunk, or of another request.
            start += data.draw(st.integers(0, 2), "gap")
            if count and (name in expected or len(expected) < ROWS):
                parts.append((name, start, range(begin, begin + count)))
                expected.setdefault(name, {})
                start += count
        padding = data.draw(st.integers(0, TOKENS - start), "padding")
        queries = queries_of(step, start + padding)
        for name, first, places in parts:
            for offset, place in enumerate(places):
                expected[name][place] = queries[:, first + offset]
        assert take(query_buffer, parts, queries) == (fixed or bool(parts))
        for name, window in expected.items():
            found = query_buffer.windows(name)
            assert found.shape == (LAYERS, WINDOW, HEADS, DIM)
            for place, query in window.items():
                assert torch.equal(found[:, place], query)


@both_ways
def test_a_slot_is_used_again_after_its_request_is_gone(fixed: bool) -> None:
    query_buffer = make(fixed)
    whole = range(WINDOW)
    for index, name in enumerate("abc"):
        take(query_buffer, [(name, 0, whole)], queries_of(index, WINDOW))
    with pytest.raises(IndexError):
        query_buffer.select([("d", 0, whole)])
    old = query_buffer.windows("b")
    query_buffer.drop("b")
    query_buffer.drop("b")
    with pytest.raises(KeyError):
        query_buffer.windows("b")
    take(query_buffer, [("d", 0, whole)], queries_of(7, WINDOW))
    assert query_buffer.windows("d").data_ptr() == old.data_ptr()
    assert torch.equal(query_buffer.windows("d"), queries_of(7, WINDOW))
    assert torch.equal(query_buffer.windows("a"), queries_of(0, WINDOW))
    assert torch.equal(query_buffer.windows("c"), queries_of(2, WINDOW))


def test_the_index_of_a_device_never_moves() -> None:
    """A captured graph holds its address, and that of the queries."""
    query_buffer = make(fixed=True)
    held = (query_buffer._places.data_ptr(), query_buffer._queries.data_ptr())
    for step, parts in enumerate([[("a", 3, range(2))], [], [("b", 0, range(WINDOW))]]):
        assert query_buffer.select(parts)
        assert (query_buffer._places.data_ptr(), query_buffer._queries.data_ptr()) == held
        # Replaying the copies with this index is all that a graph does.
        query_buffer.take(0, queries_of(step, TOKENS)[0])
    assert torch.equal(query_buffer.windows("a")[0, :2], queries_of(0, TOKENS)[0, 3:5])
    assert torch.equal(query_buffer.windows("b")[0], queries_of(2, TOKENS)[0, :WINDOW])


def test_queries_with_heads_and_dims_merged_are_taken_too() -> None:
    query_buffer = make(fixed=False)
    queries = queries_of(0, 6)
    take(query_buffer, [("a", 2, range(WINDOW))], queries.flatten(2))
    assert torch.equal(query_buffer.windows("a"), queries[:, 2:])


@both_ways
def test_quantized_queries_keep_their_numbers(fixed: bool) -> None:
    """As CUDA's attention hands them over with an FP8 cache."""
    query_buffer = make(fixed)
    queries = queries_of(0, WINDOW).to(torch.float8_e4m3fn)
    take(query_buffer, [("a", 0, range(WINDOW))], queries)
    assert torch.equal(query_buffer.windows("a"), queries.float())

"""Which methods a start has to prepare for."""

from typing import Any, Literal

import pytest

from vllm_kvcompress.methods import available
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.possible_methods import _words, possible_methods, tile_windows

EVICTING = {name for name in available() if name not in ("none", "scatter")}


def names(config: dict[str, Any]) -> list[tuple[str, int]]:
    parsed = KVCompressionConfig.parse(config)
    return [(m.name, m.window) for m in possible_methods(parsed, 128)]


@pytest.mark.parametrize("method", ["none", "cake"])
def test_requests_may_name_any_method_by_default(method: str) -> None:
    found = names({"method": method})
    assert {name for name, _ in found} == EVICTING
    assert len(found) == len(EVICTING)


def test_the_servers_own_method_comes_first_and_is_all_where_requests_choose_nothing() -> None:
    config = {"method": "cake", "allocator": "pyramidkv", "window": 20, "allow": {"budget": True}}
    assert names(config) == [("cake+pyramidkv", 20)]
    assert names({"method": "tova", "allow": {"method": ["h2o"]}}) == [("tova", 1), ("h2o", 32)]


def test_words_that_requests_may_choose_are_combined() -> None:
    allow = {"method": ["snapkv"], "params": {"pooling": True, "reduce": ["mean", "max"]}}
    parsed = KVCompressionConfig.parse({"method": "none", "allow": allow})
    found = {(m.scorer.pooling, m.scorer.reduce) for m in possible_methods(parsed, 128)}  # type: ignore[attr-defined]
    assert found == {(p, r) for p in ("avg", "max") for r in ("mean", "max")}


def test_windows_that_requests_may_choose_have_every_size_of_tile() -> None:
    found = names({"method": "snapkv", "allow": {"params": {"window": {"max": 64}}}})
    assert {1, 2, 3, 31, 32, 33 - 1, 63, 64} <= {window for _, window in found}
    assert tile_windows(20) == [1, 2, 3, 4, 7, 8, 15, 16]


@pytest.mark.parametrize(
    "annotation", [Literal["a", "b"], "Literal['a', 'b']", 'typing.Literal["a", "b"]']
)
def test_words_are_read_from_annotations_of_either_kind(annotation: object) -> None:
    assert _words(annotation) == ("a", "b")
    assert _words("int | None") == _words(int) == ()

"""One method's tokens with another's budgets: how it is asked for and what is computed."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kvcompress_kernels.scoring import window_statistics
from tests.support.budgets import page_budgets, token_budgets
from tests.support.layers import DIM, HEADS, random_layer, score_random
from vllm_kvcompress.methods import (
    Cake,
    DynamicKV,
    KeyDiff,
    Method,
    Need,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
    Tova,
    available,
    get_method,
    to_numbers,
)
from vllm_kvcompress.methods.released_attention import window_attention
from vllm_kvcompress.planning.config import KVCompressionConfig

PARTS = [name for name in available() if not get_method(name, {}).scorer.keeps_all]
BOTH = frozenset({Need.WINDOW_QUERIES, Need.KEYS})


def compose(scorer: Method, allocator: Method) -> Method:
    return Method(f"{scorer.name}+{allocator.name}", scorer.scorer, allocator.allocator)


# ------------------------------------------------------------------------------ how it is asked for


def test_a_part_is_replaced_by_name() -> None:
    assert get_method("cake", {"scorer": "keydiff"}) == compose(KeyDiff(), Cake())
    assert get_method("cake", {"allocator": "keydiff"}) == compose(Cake(), KeyDiff())
    assert get_method("cake", {"scorer": "keydiff"}).name == "keydiff+cake"


def test_parameters_go_to_the_part_that_they_belong_to() -> None:
    found = get_method("snapkv", {"kernel": 7, "allocator": {"method": "dynamickv", "r_max": 5}})
    assert found == compose(SnapKV(kernel=7), DynamicKV(r_max=5))
    found = get_method("cake", {"tau1": 1.6, "window": 8, "scorer": {"method": "tova"}})
    assert found == compose(Tova(window=8), Cake(window=8, tau1=1.6))


def test_both_parts_may_be_replaced() -> None:
    found = get_method(
        "cake", {"window": 16, "scorer": "random", "allocator": {"method": "pyramidkv", "beta": 4}}
    )
    assert found == compose(Random(window=16), PyramidKV(window=16, beta=4))
    assert hash(found) == hash(replace(found))


def test_a_method_may_lend_itself_a_part_with_other_parameters() -> None:
    found = get_method("cake", {"tau1": 3.0, "scorer": {"method": "cake", "gamma": 0.0}})
    assert found == compose(Cake(gamma=0.0), Cake(tau1=3.0))
    assert found.name == "cake+cake"


GOES_ALONE = "it cannot be combined with the scorer or allocator of another method, as it keeps "


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("cake", {"scorer": "lru"}, 'unknown method "lru", known are cake, dynamickv, h2o, '),
        ("cake", {"scorer": 3}, "cake: scorer must be the name of a method or a mapping"),
        ("cake", {"scorer": None}, "got None"),
        ("cake", {"allocator": {"r_max": 3}}, r"cake: allocator must be .*, got {'r_max': 3}"),
        ("cake", {"allocator": {"method": ["x"]}}, "cake: allocator must be the name"),
        (
            "cake",
            {"scorer": {"method": "snapkv", "window": 8}},
            "cake: scorer must not have a window, as all parts share .* window of 32, got 8",
        ),
        (
            "cake",
            {"scorer": {"method": "snapkv", "gamma": 8}},
            'snapkv: unknown parameter "gamma", accepted are kernel, pooling, reduce',
        ),
        (
            "cake",
            {"scorer": {"method": "knorm", "kernel": 5}},
            'knorm: unknown parameter "kernel", accepted are none',
        ),
        (
            "cake",
            {"scorer": {"method": "snapkv", "scorer": "tova"}},
            'snapkv: unknown parameter "scorer", accepted are kernel',
        ),
        ("cake", {"scorer": {"method": "snapkv", "kernel": 4}}, "snapkv: kernel must be an odd"),
        ("cake", {"scorer": "scatter"}, f"scatter: {GOES_ALONE}"),
        ("cake", {"allocator": "none"}, f"none: {GOES_ALONE}"),
        ("scatter", {"allocator": "cake"}, f"scatter: {GOES_ALONE}"),
        ("cake", {"scorer": "tova", "faithful": True}, f"cake: {GOES_ALONE}"),
        ("tova", {"allocator": {"method": "dynamickv", "faithful": True}}, "dynamickv: it cannot"),
        ("tova", {"allocator": "cake"}, "cake: window must be an integer of at least 2, got 1"),
        (
            "cake",
            {"gamma": 3.0, "scorer": "keydiff"},
            "cake: gamma has no effect, as the scorer is replaced, got 3.0",
        ),
        (
            "cake",
            {"tau2": 3.0, "allocator": "pyramidkv"},
            "cake: tau2 has no effect, as the allocator is replaced, got 3.0",
        ),
        (
            "snapkv",
            {"allocator": {"method": "cake", "kernel": 7}},
            "cake: kernel has no effect, as only its allocator is used, got 7",
        ),
        (
            "cake",
            {"scorer": {"method": "pyramidkv", "beta": 7}},
            "pyramidkv: beta has no effect, as only its scorer is used, got 7",
        ),
        (
            "cake",
            {"scorer": "tova", "allocator": "uniform", "window": 8, "gamma": 1.0},
            "cake: gamma has no effect, as scorer and allocator are both replaced .*, got 1.0",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_method(name, params)


def test_parts_of_different_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tova\+cake: both parts share one window, got 1 for the"):
        compose(Tova(), Cake())


def test_settings_of_an_engine_carry_compositions() -> None:
    given = {
        "method": "cake",
        "budget": 64,
        "window": 8,
        "scorer": {"method": "streamingllm", "sinks": 2},
    }
    config = KVCompressionConfig.parse(given)
    assert config.build_method() == compose(StreamingLLM(window=8, sinks=2), Cake(window=8))
    again = KVCompressionConfig.parse(json.loads(json.dumps(config.as_dict())))
    assert again.build_method() == config.build_method()


# --------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("scorer", PARTS)
@pytest.mark.parametrize("allocator", PARTS)
def test_tokens_are_the_scorers_and_budgets_the_allocators(scorer: str, allocator: str) -> None:
    first, second = (get_method(name, {"window": 8}) for name in (scorer, allocator))
    method = compose(first, second)
    found = score_random(method)
    for index, (mine, theirs) in enumerate(zip(found, score_random(first), strict=True)):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert dict(mine.stats) == dict(second.allocator.stats(random_layer(method, index)))
    numbers = to_numbers(found)
    for budgets in (
        lambda m: token_budgets(m, numbers, base=24, num_layers=6),
        lambda m: page_budgets(m, numbers, pages_per_layer=4, block_size=8, lengths=100),
    ):
        assert budgets(method).tolist() == budgets(second).tolist()
    assert torch.equal(method.select(found[0], 9), first.select(found[0], 9))
    assert method.needs == first.scorer.needs | second.allocator.needs
    assert method.scorer.budgets_are_nested


def test_only_what_is_used_is_collected() -> None:
    assert get_method("cake", {"scorer": "random"}).needs == BOTH
    assert get_method("dynamickv", {"scorer": "random"}).needs == frozenset()
    assert get_method("dynamickv", {"scorer": "knorm"}).needs == {Need.KEYS}
    assert get_method("random", {"allocator": "snapkv"}).needs == frozenset()
    assert not get_method("dynamickv", {"scorer": "knorm"}).uses_window_statistics
    assert get_method("cake", {"scorer": "knorm"}).uses_window_statistics
    assert get_method("cake", {"scorer": "tova"}).uses_window_statistics


@pytest.mark.parametrize(
    ("scorer", "allocator", "sweeps", "reads", "observed", "reads_observed"),
    [
        # Both read the window's statistics: once, from the keys or from a kernel.
        ("snapkv", "cake", 1, 1, 1, 0),
        ("dynamickv", "cake", 1, 1, 1, 0),
        ("cake", "cake", 1, 1, 1, 0),
        # One does, the other reads keys.
        ("keydiff", "cake", 1, 1, 1, 1),
        # TOVA's one query is a sweep of its own, from the same keys.
        ("tova", "cake", 2, 1, 1, 1),
        # One part reads nothing.
        ("streamingllm", "cake", 1, 1, 1, 0),
        ("snapkv", "dynamickv", 1, 1, 1, 0),
        ("knorm", "pyramidkv", 0, 1, 0, 1),
        ("random", "dynamickv", 0, 0, 0, 0),
    ],
)
def test_nothing_is_computed_twice(
    monkeypatch: pytest.MonkeyPatch,
    scorer: str,
    allocator: str,
    sweeps: int,
    reads: int,
    observed: int,
    reads_observed: int,
) -> None:
    method = compose(*(get_method(name, {"window": 8}) for name in (scorer, allocator)))
    layer = random_layer(method, 3, queries=torch.randn(HEADS, 8, DIM))
    expected = method.score(layer)
    made = Mock(wraps=window_statistics)
    monkeypatch.setattr("vllm_kvcompress.methods.reads.window_statistics", made)
    keys = Mock(return_value=layer.keys)
    found = method.score(replace(layer, keys=None, read_keys=keys))
    assert (made.call_count, keys.call_count) == (sweeps, reads)
    assert torch.equal(found.tokens, expected.tokens)
    assert dict(found.stats) == dict(expected.stats)

    assert layer.queries is not None
    assert layer.keys is not None
    seen = window_statistics(layer.queries, layer.keys, window=8, scale=layer.scale)
    statistics, keys = Mock(return_value=seen), Mock(return_value=layer.keys)
    found = method.score(replace(layer, keys=None, read_keys=keys, observe=statistics))
    assert (statistics.call_count, keys.call_count) == (observed, reads_observed)
    assert torch.equal(found.tokens, expected.tokens)
    assert dict(found.stats) == dict(expected.stats)


@pytest.mark.parametrize(
    ("name", "function"),
    [("cake", "cake.window_attention"), ("dynamickv", "released_dynamickv.window_attention")],
)
def test_faithful_parts_share_one_look(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str
) -> None:
    made = Mock(wraps=window_attention)
    monkeypatch.setattr(f"vllm_kvcompress.methods.{function}", made)
    method = get_method(name, {"window": 8, "faithful": True})
    assert method.score(random_layer(method)).stats
    assert made.call_count == 1

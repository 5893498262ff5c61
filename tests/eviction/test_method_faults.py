"""A method that fails for one request: that request keeps its last tokens, and no other notices."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompress_kernels import selection
from tests.support.cut_world import BUDGET, BUFFER, KV_HEADS, LAYERS, World
from tests.support.faulty_methods import FAULTS, WINDOW, OopsError, faulty, oops
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.methods import (
    Allocator,
    LayerInput,
    available,
    parts,
    registry,
)
from vllm_kvcompress.paging.strided_codec import StridedPageCodec


@pytest.fixture
def make_faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    available()

    def known(kind: str, at: int = 3) -> None:
        monkeypatch.setitem(registry._methods, "faulty", faulty(kind, at))

    return known


def kept_of(world: World, name: str, number: int = 1) -> list[list[list[int]]]:
    records = world.reporter.records or []
    (record,) = [r for r in records if (r.request_id, r.number) == (name, number)]
    return [layer.tolist() for layer in record.kept]


def make_request(world: World, method: str, tokens: int = 100, **more: Any) -> WorkerRequest:
    config = {"window": WINDOW}
    extra = {"kv_compression": method, "kv_compression_config": config, **more}
    return world.request(tokens, extra)


def cut_three(method: str, together: bool) -> World:
    """Cut a request of some method between two of others."""
    world = World("torch", {"method": "snapkv"})
    requests = {
        "first": make_request(world, "snapkv", 133),
        "bad": make_request(world, method),
        "second": make_request(world, "cake", 90),
    }
    world.cut(requests, together)  # verifies pages and blocks
    return world


@pytest.fixture(scope="module")
def without_faults() -> dict[bool, dict[str, Any]]:
    """What the two others keep."""
    found = {together: cut_three("snapkv", together) for together in (False, True)}
    return {
        together: {name: kept_of(world, name) for name in ("first", "second")}
        for together, world in found.items()
    }


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
def test_it_keeps_its_last_tokens_and_the_others_theirs(
    kind: str,
    together: bool,
    make_faulty: Callable[..., None],
    without_faults: dict[bool, dict[str, Any]],
) -> None:
    make_faulty(kind)
    world = cut_three("faulty", together)
    for name in ("first", "second"):
        assert kept_of(world, name) == without_faults[together][name]
    assert kept_of(world, "bad") == [[list(range(100 - BUDGET, 100))] * KV_HEADS] * LAYERS
    assert world.reporter.report.fallbacks == {"faulty": 1}
    told = {r.request_id: r.fallback for r in world.reporter.records or []}
    assert told["first"] is None
    assert told["second"] is None
    assert told["bad"] is not None
    assert told["bad"].startswith("faulty: ")
    assert re.search(FAULTS[kind][1], told["bad"]), told["bad"]


def test_beside_others_on_the_kernels_of_a_gpu(
    make_faulty: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    make_faulty("raise", 1)
    for module in (parts, selection):
        monkeypatch.setattr(module, "use_triton", lambda tensor, wanted: wanted != "torch")

    def kept(implementation: Any, method: str) -> World:
        world = World(implementation, {"method": "snapkv"}, 2)
        requests = {name: make_request(world, name, 90) for name in ("snapkv", method)}
        world.cut(requests, True)
        return world

    world = kept("triton", "faulty")
    assert kept_of(world, "snapkv") == kept_of(kept("triton", "tova"), "snapkv")
    assert kept_of(world, "faulty") == [[list(range(90 - BUDGET, 90))] * KV_HEADS] * 2


def test_a_log_line_a_request_and_a_traceback_a_method(
    make_faulty: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    make_faulty("raise")
    world = World("torch", {"method": "snapkv"})
    requests = {name: make_request(world, "faulty") for name in ("one", "two")}
    with caplog.at_level(logging.ERROR):
        world.cut(requests, True)
        for name, request in requests.items():
            world.generate(name, request)
        world.cut(requests, True)
    assert [line.getMessage().partition(":")[0] for line in caplog.records] == [
        f"method faulty failed for request {name}, which keeps its most recent tokens instead"
        for name in requests
    ]
    assert all("no such thing" in line.getMessage() for line in caplog.records)
    traces = [line.exc_text or "" for line in caplog.records]
    assert [f"in {oops.__name__}" in trace for trace in traces] == [True, False]
    assert world.reporter.report.fallbacks == {"faulty": 4}


@pytest.mark.parametrize("kind", ["raise", "weights nan", "select twice"])
def test_pinned_tokens_stay_and_later_cuts_follow(
    kind: str, make_faulty: Callable[..., None]
) -> None:
    make_faulty(kind)
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty", kv_compression_keep=[2, 4, 30, 33])
    for _ in range(3):
        world.cut({"bad": request}, True)
        world.generate("bad", request)
    last = range(100 - BUDGET + 5, 100)
    assert kept_of(world, "bad") == [[[2, 3, 30, 31, 32, *last]] * KV_HEADS] * LAYERS
    if kind == "weights nan":
        return  # a cut within the same blocks asks for no weights
    # Places now: the pinned ones are the first of what was kept.
    later = [*range(5), *range(BUFFER + 5, BUFFER + BUDGET)]
    for number in (2, 3):
        assert kept_of(world, "bad", number) == [[later] * KV_HEADS] * LAYERS


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("method", ["cake", "dynamickv", "snapkv", "keydiff", "tova", "knorm"])
def test_a_model_that_turns_nan_ends_nothing(method: str, together: bool) -> None:
    world = World("torch", {"method": "snapkv"})
    requests = {
        "good": make_request(world, "snapkv"),
        "bad": make_request(world, method, kv_compression_keep=[2, 4]),
    }
    pages = world.arena.geometry.all_pages(requests["bad"].blocks[:7]).reshape(-1)
    world.cache[torch.from_numpy(pages)] = math.nan
    if (window := requests["bad"].window) is not None:
        window.fill_(math.nan)
    world.cut(requests, together)
    last = range(100 - BUDGET + 2, 100)
    assert kept_of(world, "bad") == [[[2, 3, *last]] * KV_HEADS] * LAYERS
    assert world.reporter.report.fallbacks == {method: 1}


@pytest.mark.parametrize("faithful", ["cake", "dynamickv"])
def test_faithful_forms_fall_back_too(faithful: str) -> None:
    buffer = {"decode_buffer": 1} if faithful == "cake" else {}
    world = World("torch", {"method": faithful, "faithful": True, **buffer})
    request = world.request(100)
    assert request.window is not None
    request.window.fill_(math.nan)
    world.cut({"bad": request}, True)
    assert kept_of(world, "bad") == [[list(range(100 - BUDGET, 100))] * KV_HEADS] * LAYERS


@pytest.mark.parametrize("kind", FAULTS)
def test_a_cascade_goes_on_without_its_method(kind: str, make_faulty: Callable[..., None]) -> None:
    make_faulty(kind)
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty", kv_compression_keep=[2, 4, 30, 33])
    world.begin_cascade(request)
    cascade = world.compressor.begin_cascade("bad", request)
    for layer in range(LAYERS):
        cascade.cut_layer(layer, None)
    cascade.finish()
    world.arena.check_integrity({"bad": request.private_blocks()})
    kept = kept_of(world, "bad")
    assert sum(len(layer[0]) for layer in kept) == BUDGET * LAYERS
    assert world.reporter.report.fallbacks == {"faulty": 1}
    (record,) = world.reporter.records or []
    assert record.fallback is not None
    assert re.search(FAULTS[kind][1], record.fallback)
    # The last layer comes after the fault or with it.
    last = range(100 - len(kept[-1][0]) + 5, 100)
    assert kept[-1] == [[2, 3, 30, 31, 32, *last]] * KV_HEADS
    # Pinned tokens are found again where they lie now.
    world.generate("bad", request)
    world.cut({"bad": request}, False)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_cascade_gives_every_layer_what_it_can(
    layer: int, make_faulty: Callable[..., None]
) -> None:
    """All layers alike if no layer holds less already."""
    make_faulty("raise", layer)
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty")
    world.begin_cascade(request)
    cascade = world.compressor.begin_cascade("bad", request)
    for number in range(LAYERS):
        cascade.cut_layer(number, None)
    cascade.finish()
    assert [len(own[0]) for own in kept_of(world, "bad")] == [BUDGET] * LAYERS


def test_a_layer_that_is_scored_in_the_step(make_faulty: Callable[..., None]) -> None:
    make_faulty("raise")
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty")
    for layer in range(LAYERS):
        keys = torch.randn(KV_HEADS, 100, 8, generator=world.random)
        world.compressor.score_in_step(layer, request, keys)
    world.cut({"bad": request}, False)
    assert kept_of(world, "bad") == [[list(range(100 - BUDGET, 100))] * KV_HEADS] * LAYERS
    assert request.fault is None


class LostError(torch.AcceleratorError):
    """The device is gone."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, LostError, SystemExit])
def test_what_is_no_fault_of_the_method_is_not_caught(
    error: type[BaseException], make_faulty: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: LayerInput) -> Tensor:
        raise error

    monkeypatch.setitem(FAULTS, "raise", (fail, ""))
    make_faulty("raise")
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty")
    with pytest.raises(error):
        world.cut({"bad": request}, True)


@pytest.mark.parametrize(("error", "ends"), [(IndexError, True), (torch.OutOfMemoryError, False)])
def test_pages_that_cannot_be_read_are_ours(
    error: type[Exception], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "knorm")

    def fail(*_: Any) -> Tensor:
        raise error("page 7")

    monkeypatch.setattr(StridedPageCodec, "read_keys", fail)
    if ends:
        with pytest.raises(IndexError, match="page 7"):
            world.cut({"bad": request}, True)
    else:
        world.cut({"bad": request}, True)
        assert world.reporter.report.fallbacks == {"knorm": 1}


def test_who_only_stood_beside_a_fault_is_cut_as_ever(
    make_faulty: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One call weighs the layers of both; the one whose weights are good loses nothing."""
    monkeypatch.setitem(FAULTS, "weights", (lambda n: np.ones(n), ""))
    make_faulty("weights")
    allocator = type(registry._methods["faulty"]().allocator)

    def by_stage(self: Allocator, divisions: Any, *, num_layers: int) -> Any:
        if any(len(d.layers[0].tokens[0]) > 100 for d in divisions):
            raise OopsError("too long")
        return Allocator.weights_by_stage(self, divisions, num_layers=num_layers)

    monkeypatch.setattr(allocator, "weights_by_stage", by_stage, raising=False)
    world = World("torch", {"method": "snapkv"})
    requests = {name: make_request(world, "faulty", n) for name, n in (("bad", 133), ("good", 90))}
    world.cut(requests, True)
    assert kept_of(world, "bad") == [[list(range(133 - BUDGET, 133))] * KV_HEADS] * LAYERS
    assert kept_of(world, "good") != [[list(range(90 - BUDGET, 90))] * KV_HEADS] * LAYERS
    assert world.reporter.report.fallbacks == {"faulty": 1}
    assert "while request good was cut beside others, and not for it alone" in caplog.text

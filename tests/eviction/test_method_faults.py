"""A method that fails for one request: that request keeps its last tokens, and no other notices."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cut_world import BUDGET, BUFFER, KV_HEADS, LAYERS, World
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.methods import (
    WINDOW_NEEDS,
    Allocator,
    LayerInput,
    LayerScores,
    MethodSpec,
    Scorer,
    available,
    registry,
    window_votes,
)
from vllm_kvcompress.paging.strided_codec import StridedPageCodec

WINDOW, FAULTY_LAYER = 8, 3
Maker = Callable[..., Any]


class OopsError(Exception):
    """What only the method knows."""


def oops(*_: Any) -> Any:
    raise OopsError("no such thing")


def good(layer: LayerInput) -> Tensor:
    return window_votes(layer, kernel=3)


def one_of(tokens: Tensor, number: float) -> Tensor:
    tokens = tokens.clone()
    tokens[1, 17] = number
    return tokens


SCORES: dict[str, tuple[Maker, str]] = {
    "raise": (oops, "scoring layer 3 has raised OopsError: no such thing"),
    "exhausted": (
        lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")),
        "scoring layer 3 has raised OutOfMemoryError: out of memory",
    ),
    "nothing": (lambda _: None, "the scorer has returned NoneType for layer 3, not a tensor"),
    "whole": (
        lambda layer: torch.arange(layer.num_tokens).float().repeat(layer.num_kv_heads, 1),
        r"torch.float32 \[2, 92\] for layer 3 \(KV heads, .*\), got torch.float32 \[2, 100\]",
    ),
    "short": (lambda layer: good(layer)[:, 3:], r"\[2, 92\] .*, got torch.float32 \[2, 89\]"),
    "heads": (lambda layer: good(layer)[:1], r"\[2, 92\] .*, got torch.float32 \[1, 92\]"),
    "flat": (lambda layer: good(layer)[0], r"\[2, 92\] .*, got torch.float32 \[92\]"),
    "integers": (lambda layer: good(layer).long(), r"\[2, 92\] .*, got torch.int64 \[2, 92\]"),
    "device": (lambda layer: good(layer).to("meta"), "has returned scores on meta for layer 3"),
    "nan": (lambda layer: one_of(good(layer), math.nan), "1 of 184 scores of layer 3 are not fin"),
    "infinite": (lambda layer: one_of(good(layer), math.inf), "1 of 184 scores of layer 3 are not"),
}
STATS: dict[str, tuple[Maker, str]] = {
    "stats raise": (oops, "scoring layer 3 has raised OopsError: no such thing"),
    "stats list": (lambda _: [1.0], "stats of layer 3 must be a mapping, got list"),
    "stats text": (lambda _: {"x": "1"}, r'the stat "x" of layer 3 must be a number .*, got str'),
    "stats nan": (lambda _: {"x": math.nan}, 'the stat "x" of layer 3 is NaN'),
    "stats nan tensor": (lambda _: {"x": torch.tensor(math.nan)}, 'the stat "x" of layer 3 is NaN'),
}
WEIGHTS: dict[str, tuple[Maker, str]] = {
    "weights raise": (oops, "weighing the layers has raised OopsError: no such thing"),
    "weights nan": (
        lambda n: np.full(n, math.nan),
        "must be finite and not negative, got nan",
    ),
    "weights inf": (lambda n: [math.inf] * n, "weights must be finite and not negative, got inf"),
    "weights negative": (lambda n: [-1.0] * n, "weights must be finite and not negative, got -1.0"),
    "weights few": (lambda n: np.ones(n - 1), r"weights must have shape \(5,\), got \(4,\)"),
    "weights words": (lambda n: ["a"] * n, "weighing the layers has raised ValueError: could not"),
    "weights nothing": (lambda n: None, r"weights must have shape \(5,\), got \(\)"),
}
CHOICES: dict[str, tuple[Maker, str]] = {
    "select raise": (oops, "selecting tokens has raised OopsError: no such thing"),
    "select few": (
        lambda ids: ids[:, 1:],
        r"return integers \[2, \d+\] .*, got torch.int64 \[2,",
    ),
    "select floats": (
        lambda ids: ids.float(),
        r"return integers \[2, \d+\] .*, got torch.float32 \[",
    ),
    "select twice": (
        lambda ids: torch.cat([ids[:, 1:2], ids[:, 1:]], dim=1),
        "must return ascending tokens below 92, each once",
    ),
    "select beyond": (lambda ids: ids + 92, "must return ascending tokens below 92, each once"),
    "select below": (lambda ids: ids - 92, "must return ascending tokens below 92, each once"),
}
LIMITS: dict[str, tuple[Maker, str]] = {
    "cap raise": (oops, "its cap has raised OopsError: no such thing"),
    "cap float": (lambda: 1.5, "its cap must be an integer of at least 0, got 1.5"),
    "floor negative": (lambda: -1, "its floor must be an integer of at least 0, got -1"),
}
FAULTS = {**SCORES, **STATS, **WEIGHTS, **CHOICES, **LIMITS}


def faulty(kind: str) -> MethodSpec:
    """A method of another package that does as asked but for one fault."""
    make = FAULTS[kind][0]

    @dataclass(frozen=True, kw_only=True)
    class FaultyScorer(Scorer):
        needs = WINDOW_NEEDS
        uses_window_statistics: ClassVar[bool] = True

        def score(self, layer: LayerInput) -> Tensor:
            fails = kind in SCORES and layer.layer == FAULTY_LAYER
            found: Tensor = make(layer) if fails else good(layer)
            return found

    @dataclass(frozen=True, kw_only=True)
    class ChoosingScorer(FaultyScorer):
        def select(self, tokens: Tensor, count: int) -> Tensor:
            found: Tensor = make(super().select(tokens, count))
            return found

        budgets_are_nested: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class FaultyAllocator(Allocator):
        needs = WINDOW_NEEDS

        @property
        def layers_per_division(self) -> int:
            return 2

        def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
            fails = kind in STATS and layer.layer == FAULTY_LAYER
            return make(layer) if fails else {"x": 1.0}  # type: ignore[no-any-return]

        def weights(self, seen: Sequence[LayerScores], *, base: int, num_layers: int) -> Any:
            if kind in WEIGHTS and len(seen) == num_layers:
                return make(len(seen))
            return np.arange(1.0, 1.0 + len(seen))

        def cap(self, history: int, base: int) -> int:
            return make() if kind.startswith("cap") else history  # type: ignore[no-any-return]

        def floor(self, history: int, base: int) -> int:
            return make() if kind.startswith("floor") else 0  # type: ignore[no-any-return]

    scorer = ChoosingScorer if kind in CHOICES else FaultyScorer
    return MethodSpec(name="faulty", scorer=scorer, allocator=FaultyAllocator, window=WINDOW, api=1)


@pytest.fixture
def make_faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    available()

    def known(kind: str) -> None:
        monkeypatch.setitem(registry._methods, "faulty", faulty(kind))

    return known


def kept_of(world: World, name: str, number: int = 1) -> list[list[list[int]]]:
    records = world.reporter.records or []
    (record,) = [r for r in records if (r.request_id, r.number) == (name, number)]
    return [layer.tolist() for layer in record.kept]


def make_request(world: World, method: str, tokens: int = 100, **more: Any) -> WorkerRequest:
    config = {"window": WINDOW}
    extra = {"kv_compression": method, "kv_compression_config": config, **more}
    return world.request(tokens, extra)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
def test_it_keeps_its_last_tokens_and_the_others_theirs(
    kind: str, together: bool, make_faulty: Callable[[str], None]
) -> None:
    make_faulty(kind)

    def cut(method: str) -> World:
        world = World("torch", {"method": "snapkv"})
        requests = {
            "first": make_request(world, "snapkv", 133),
            "bad": make_request(world, method),
            "second": make_request(world, "cake", 90),
        }
        world.cut(requests, together)  # verifies pages and blocks
        return world

    world, expected = cut("faulty"), cut("snapkv")
    for name in ("first", "second"):
        assert kept_of(world, name) == kept_of(expected, name)
    assert kept_of(world, "bad") == [[list(range(100 - BUDGET, 100))] * KV_HEADS] * LAYERS
    assert world.reporter.report.fallbacks == {"faulty": 1}
    told = {r.request_id: r.fallback for r in world.reporter.records or []}
    assert told["first"] is None
    assert told["second"] is None
    assert told["bad"] is not None
    assert told["bad"].startswith("faulty: ")
    assert re.search(FAULTS[kind][1], told["bad"]), told["bad"]


def test_a_log_line_a_request_and_a_traceback_a_method(
    make_faulty: Callable[[str], None], caplog: pytest.LogCaptureFixture
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
    kind: str, make_faulty: Callable[[str], None]
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
def test_a_cascade_goes_on_without_its_method(
    kind: str, make_faulty: Callable[[str], None]
) -> None:
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
    layer: int, make_faulty: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers alike if no layer holds less already."""
    monkeypatch.setattr("tests.eviction.test_method_faults.FAULTY_LAYER", layer)
    make_faulty("raise")
    world = World("torch", {"method": "snapkv"})
    request = make_request(world, "faulty")
    world.begin_cascade(request)
    cascade = world.compressor.begin_cascade("bad", request)
    for number in range(LAYERS):
        cascade.cut_layer(number, None)
    cascade.finish()
    assert [len(own[0]) for own in kept_of(world, "bad")] == [BUDGET] * LAYERS


def test_a_layer_that_is_scored_in_the_step(make_faulty: Callable[[str], None]) -> None:
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
    error: type[BaseException], make_faulty: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
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

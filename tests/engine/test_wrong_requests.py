"""Requests that no front end has judged: the scheduler ends each of them, never the engine."""

from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import Request

from tests.support.scheduling import BOTH, SIZE, AnyScheduler, Engine, configure
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaScheduler
from vllm_kvcompress.planning.request_settings import SettingsResolver


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG: list[dict[Any, Any]] = [
    {"kv_compression": "zip"},
    {"kv_compression": ["cake"]},
    {"kv_compression": nested(100_000)},
    {"kv_compression": "scatter"},
    {"kv_compression": {"a": {"b": {1: None}}}},
    {"kv_compression": b"\xff"},
    {"kv_compression": object()},
    {"kv_compression_budget": float("nan")},
    {"kv_compression_budget": float("inf")},
    {"kv_compression_budget": -(10**400)},
    {"kv_compression_budget": 10**400},
    {"kv_compression_budget": "12"},
    {"kv_compression_budget": True},
    {"kv_compression_budget": 0.0},
    {"kv_compression_config": "{"},
    {"kv_compression_config": "[" * 100_000},
    {"kv_compression_config": '{"window": ' + "9" * 10_000 + "}"},
    {"kv_compression_config": {"window": nested(100_000)}},
    {"kv_compression_config": {1: 2}},
    {"kv_compression_config": "\ud800"},
    {"kv_compression_keep": [[0, 1], [2]]},
    {"kv_compression_keep": nested(100_000)},
    {"kv_compression_keep": [0, 10**400]},
    {"kv_compression_decode": "yes"},
    {"kv_compression_decode": float("nan")},
    {"kv_compression_other": 1},
    {"kv_compression\x00": 1},
    {7: 1},
]

NONE, ZIP = {"kv_compression": "none"}, {"kv_compression": "zip"}


def make(name: str, extra: Any = None, prompt: int = 100, **options: Any) -> Request:
    resumable, hasher = options.pop("resumable", False), options.pop("hasher", None)
    params = SamplingParams(**{"max_tokens": 3, "ignore_eos": True, **options})
    params.extra_args = extra
    return Request(
        name,
        [7] * prompt,
        params,
        None,
        arrival_time=0.0,
        resumable=resumable,
        block_hasher=hasher,
    )


def turn(engine: Engine) -> list[EngineCoreOutput]:
    """One step, of which no result is left in flight; what went to the front ends."""
    output = engine.schedule()
    result = engine.in_flight.pop().result if output.num_scheduled_tokens else None
    sent = engine.scheduler.update_from_output(output, result or EMPTY_MODEL_RUNNER_OUTPUT)
    return [item for outputs in sent.values() for item in outputs.outputs]


@BOTH
def test_settings_of_any_kind_end_their_request_alone(folder: Path, cls: AnyScheduler) -> None:
    engine = Engine(cls, configure(folder), 60)
    engine.add("good", 100, max_tokens=len(WRONG) + 2)
    turn(engine)
    for number, extra in enumerate(WRONG):
        name = f"wrong{number}"
        engine.scheduler.add_request(make(name, extra))
        good, ended = turn(engine)
        assert (good.request_id, good.finish_reason) == ("good", None)
        assert (ended.request_id, ended.finish_reason) == (name, FinishReason.ERROR), extra
        assert list(engine.scheduler.requests) == ["good"]
    (last,) = turn(engine)
    assert (last.request_id, last.finish_reason) == ("good", FinishReason.LENGTH)
    assert not engine.scheduler.requests
    assert engine.free == engine.total


@BOTH
def test_a_wrong_request_alone_ends_in_its_first_step(folder: Path, cls: AnyScheduler) -> None:
    engine = Engine(cls, configure(folder), 60)
    engine.scheduler.add_request(make("bad", ZIP))
    (ended,) = turn(engine)
    assert ended.finish_reason == FinishReason.ERROR
    assert not engine.scheduler.has_unfinished_requests()


@BOTH
def test_what_the_engine_cannot_serve_is_ended(deep: Path, cls: AnyScheduler) -> None:
    engine = Engine(cls, configure(deep, prefill="auto"), 8)
    wrong = [
        make("continued", resumable=True),
        # Its grammar may be ready before it is ended.
        make("json", ZIP, structured_outputs=StructuredOutputsParams(json={})),
        # More than the pool can hold: it would be admitted never, or preempt itself for ever.
        make("long prompt", NONE, prompt=60),
        make("long answer", NONE, prompt=20, max_tokens=50),
    ]
    for request in wrong:
        engine.scheduler.add_request(request)
        (ended,) = turn(engine)
        assert (ended.request_id, ended.finish_reason) == (request.request_id, FinishReason.ERROR)
    # Who names no limit gets what there is room for.
    endless = make("endless", NONE, prompt=20, max_tokens=180, hasher=engine._hasher)
    engine.chunks["endless"] = []
    engine.scheduler.add_request(endless)
    sent = [turn(engine)[0] for _ in range(7 * SIZE - 20)]
    assert [item.finish_reason for item in sent[-2:]] == [None, FinishReason.LENGTH]
    assert not engine.scheduler.requests
    assert engine.free == engine.total


def test_what_nobody_has_foreseen_ends_its_request_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 60)
    original = SettingsResolver.resolve

    def resolve(self: SettingsResolver, extra: Any, prompt_len: int) -> Any:
        if extra:
            raise KeyError("a bug")
        return original(self, extra, prompt_len)

    monkeypatch.setattr(SettingsResolver, "resolve", resolve)
    engine.add("good", 100, max_tokens=1)
    engine.scheduler.add_request(make("bad", {"kv_compression_budget": 24}))
    reasons = {item.request_id: item.finish_reason for item in turn(engine)}
    assert reasons == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}

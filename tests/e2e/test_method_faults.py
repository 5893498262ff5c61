"""A request whose method fails keeps its last tokens; no answer beside it changes."""

from typing import Any

import pytest

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import LAYERS, Engines
from tests.support.faulty_methods import WINDOW, faulty
from vllm_kvcompress.methods import available, registry

pytestmark = pytest.mark.engine

BUDGET = 128
LAST = setting("streamingllm", BUDGET, window=WINDOW, sinks=0)
"""Keeps what a request gets whose method fails."""


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a faulty method known, and return a function that has an engine record its cuts."""
    available()

    def begin(engine: Engine, kind: str) -> list[Any]:
        monkeypatch.setitem(registry._methods, "faulty", faulty(kind, LAYERS - 2))
        records: list[Any] = []
        engine.session.reporter.records = records
        return records

    return begin


@pytest.mark.parametrize(
    ("kind", "prefill"),
    [
        ("raise", "full"),
        ("whole", "full"),
        ("select twice", "full"),
        ("nan", "cascade"),
        ("weights nan", "cascade"),
    ],
)
def test_others_answers_do_not_change(
    engines: Engines, prose: list[int], noted: Any, kind: str, prefill: str
) -> None:
    engine = engines.open(config={"prefill": prefill})
    prompts = [prose[:500], prose[300:633], prose[2000:2300]]
    asked = [setting("cake", BUDGET), LAST, setting("snapkv", BUDGET)]
    expected = [engine.generate([p], 4, **a)[0] for p, a in zip(prompts, asked, strict=True)]
    records = noted(engine, kind)
    asked[1] = setting("faulty", BUDGET, window=WINDOW)
    names = [engine.caller_id[engine.add(p, 4, **a)] for p, a in zip(prompts, asked, strict=True)]
    done = engine.drain()
    found = [done[name] for name in names]
    assert [found[0], found[2]] == [expected[0], expected[2]]
    told = {r.method: r.fallback for r in records}
    assert told["cake"] is told["snapkv"] is None
    assert told["faulty"].startswith("faulty: ")
    if prefill == "full":  # in a cascade, layers that are cut keep what they have
        assert found[1] == expected[1]
    assert len(found[1]) == 4


def test_while_it_generates(engines: Engines, prose: list[int], noted: Any) -> None:
    engine = engines.limited()
    prompts, tokens = [prose[:300], prose[700:1000]], 70
    last = setting("streamingllm", window=WINDOW, sinks=0)
    good = engine.generate(prompts[:1], tokens)[0]
    expected = engine.generate(prompts[1:], tokens, **last)[0]
    records = noted(engine, "raise")
    names = [
        engine.add(prompts[0], tokens),
        engine.add(prompts[1], tokens, **setting("faulty", window=WINDOW)),
    ]
    done = engine.drain()
    assert [done[engine.caller_id[name]] for name in names] == [good, expected]
    failed = [r for r in records if r.fallback]
    assert len(failed) > 2
    assert {r.method for r in failed} == {"faulty"}


def test_streamed_preempted_and_while_it_generates(
    engines: Engines, prose: list[int], noted: Any
) -> None:
    """The replay of a request whose method fails keeps the same; so does who runs beside it."""
    config = {"prefill": "streaming", "stream_chunk": 128, "decode_budget": BUDGET}
    engine = engines.open(config={**config, "decode_buffer": 32, "reserve_tokens": 0})
    prompts, tokens = [prose[:600], prose[700:1500]], 50
    last = setting("streamingllm", BUDGET, window=WINDOW, sinks=0)
    good = engine.generate(prompts[:1], tokens)[0]
    expected = engine.generate(prompts[1:], tokens, **last)[0]
    records = noted(engine, "raise")
    asked = setting("faulty", BUDGET, window=WINDOW)
    names = [engine.add(prompts[0], tokens), engine.add(prompts[1], tokens, **asked)]
    done: dict[str, list[int]] = {}
    for step, outputs in enumerate(engine.steps(), start=1):
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}
        if step in (20, 45):
            engine.preempt(names[1])
    assert [done[engine.caller_id[name]] for name in names] == [good, expected]
    assert {r.method for r in records if r.fallback} == {"faulty"}
    assert all(r.fallback for r in records if r.method == "faulty")

"""Random traffic on vLLM's real schedulers: nothing leaks, nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.scheduling import make_folder
from tests.support.traffic import LAYERS, Ask, Setup, Traffic, choose_ask, choose_setup

EVENTS = (
    "preemptions",
    "hits",
    "aborts",
    "finished",
    "prefills_full",
    "prefills_cascade",
    "prefills_streaming",
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with enough layers for a cascade to save anything."""
    return make_folder(tmp_path_factory.mktemp("deep"), LAYERS)


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Setup, list[Ask]]:
    def choose(options: Any) -> Any:
        return draw(st.sampled_from(options))

    return choose_setup(choose), [choose_ask(choose) for _ in range(choose(range(10, 51)))]


def test_random_traffic_is_served_and_nothing_is_promised_twice(deep: Path) -> None:
    seen = Counter[str]()

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(scenarios())
    def serve(scenario: tuple[Setup, list[Ask]]) -> None:
        setup, asks = scenario
        traffic = Traffic(deep, setup)
        for ask in asks:
            traffic.add(ask)
        seen.update(traffic.finish())

    serve()
    # What else is drawn depends on what else is imported; the next test says what happens.
    assert seen["finished"] > 0


def test_two_thousand_requests_are_served(deep: Path) -> None:
    seen = Counter[str]()
    for seed in range(20):
        choose = random.Random(seed).choice
        traffic = Traffic(deep, choose_setup(choose, seed))
        for _ in range(100):
            traffic.add(choose_ask(choose))
        seen.update(traffic.finish())
    assert [event for event in EVENTS if seen[event] < 20] == []
    assert seen["finished"] + seen["aborts"] == 2000

"""Random traffic on vLLM's real schedulers with sliding windows beside the arena."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.scheduling import GEMMA, make_folder
from tests.support.traffic import Traffic, choose_ask, choose_setup

EVENTS = ("preemptions", "hits", "aborts", "finished", "prefills_full", "prefills_streaming")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two full-attention layers and six others."""
    return make_folder(tmp_path_factory.mktemp("hybrid"), model=GEMMA)


def test_two_thousand_requests_of_a_hybrid_are_served(hybrid: Path) -> None:
    seen = Counter[str]()
    for seed in range(20):
        choose = random.Random(seed).choice
        setup = choose_setup(choose, seed, prefills=("auto", "full", "streaming"))
        interval = choose((0, 0, None, 64))
        options = (*setup.options, ("prefix_cache_retention_interval", interval))
        traffic = Traffic(hybrid, replace(setup, options=options))
        for _ in range(100):
            traffic.add(choose_ask(choose))
        seen.update(traffic.finish())
    assert [event for event in EVENTS if seen[event] < 20] == []
    assert seen["prefills_cascade"] == 0
    assert seen["finished"] + seen["aborts"] == 2000

"""Random traffic on vLLM's real schedulers: nothing leaks, nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.support.scheduling import GEMMA, make_folder
from tests.support.traffic import Traffic, choose_ask, choose_setup

EVENTS = ("preemptions", "hits", "aborts", "finished", "prefills_full", "prefills_streaming")
SETUPS, ASKS = 50, 40


def test_random_traffic_is_served_and_nothing_is_promised_twice(deep: Path) -> None:
    seen = Counter[str]()
    for seed in range(SETUPS):
        choose = random.Random(seed).choice
        traffic = Traffic(deep, choose_setup(choose, seed))
        for _ in range(ASKS):
            traffic.add(choose_ask(choose))
        seen.update(traffic.finish())
    assert [event for event in (*EVENTS, "prefills_cascade") if seen[event] < 20] == []
    assert seen["finished"] + seen["aborts"] == SETUPS * ASKS


def test_random_traffic_of_a_hybrid_is_served(tmp_path: Path) -> None:
    """With sliding windows beside the arena: two full-attention layers and six others."""
    hybrid = make_folder(tmp_path, model=GEMMA)
    seen = Counter[str]()
    for seed in range(SETUPS):
        choose = random.Random(seed).choice
        setup = choose_setup(choose, seed, prefills=("auto", "full", "streaming"))
        interval = choose((0, 0, None, 64))
        options = (*setup.options, ("prefix_cache_retention_interval", interval))
        traffic = Traffic(hybrid, replace(setup, options=options))
        for _ in range(ASKS):
            traffic.add(choose_ask(choose))
        seen.update(traffic.finish())
    assert [event for event in EVENTS if seen[event] < 20] == []
    assert seen["prefills_cascade"] == 0
    assert seen["finished"] + seen["aborts"] == SETUPS * ASKS

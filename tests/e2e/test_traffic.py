"""Preemption, aborts and a crowd: same answers as alone, and every block comes back."""

import random

import pytest

from tests.e2e.engine import setting
from tests.e2e.harness import Engines, page_bytes

pytestmark = pytest.mark.engine

BUDGET = 128
SMALLER = setting("cake", BUDGET)
"""For an engine of a larger budget."""


@pytest.mark.parametrize("method", ["cake", "scatter"])
def test_preemption_changes_nothing(engines: Engines, prose: list[int], method: str) -> None:
    """A pool so small that requests are preempted and replayed on the compressed cache."""
    # The smallest pool that admits one request of max_model_len.
    blocks = 32 + 32 + 2 if method == "scatter" else 32 + 4 + 2
    small = engines.get(
        method,
        BUDGET,
        config={"reserve_tokens": 0},
        max_model_len=1024,
        kv_cache_memory_bytes=(blocks + 8) * page_bytes(),
    )
    large = engines.get("scatter") if method == "scatter" else engines.open()
    asked = {} if method == "scatter" else SMALLER
    prompts = [prose[31 * i : 31 * i + 150 + 13 * i] for i in range(6)]
    limits = [330, 300, 310, 290, 320, 305]
    expected = large.generate(prompts, limits, **asked)
    preempted = small.count_preemptions()
    assert small.generate(prompts, limits) == expected
    assert preempted() > 0, "the pool was not small enough"


def test_abort_at_every_stage(engines: Engines, prose: list[int]) -> None:
    """In a chunked prefill, right after the step that compressed, and while decoding."""
    engine = engines.get("cake", 256, max_num_batched_tokens=160)
    stages = set()
    for stop_after in (1, 2, 3, 4, 5, 9):
        # New prompts each time: cached prefixes would move the stages.
        start = 400 * stop_after
        keep = engine.add(prose[start : start + 200], 12, **SMALLER)
        doomed = engine.add(prose[start + 200 : start + 600], 40, **SMALLER)
        for step, _ in enumerate(engine.steps(), start=1):
            if step == stop_after:
                state = engine.manager.reservations.get(doomed)
                released = state is not None and state.released > 0
                stages.add((doomed in engine.arena, released))
                engine.abort(doomed)
                break
        engine.drain()
        assert doomed not in engine.manager.req_to_blocks
        assert keep not in engine.manager.req_to_blocks
        engine.check()
    # In its prefill; compressed but the prompt's blocks still held; decoding.
    assert stages == {(False, False), (True, False), (True, True)}


def test_sixty_four_mixed_requests(engines: Engines, prose: list[int]) -> None:
    """Short and long, compressed and not, arriving over time: equal to each run alone."""
    engine = engines.get("cake", BUDGET, max_num_seqs=64, max_num_batched_tokens=512)
    dice = random.Random(0)
    requests = []
    for _ in range(64):
        length = dice.choice([1, 20, 64, 100, 128, 129, 160, 256, 300, 500, 900])
        start = dice.randrange(0, 3000)
        requests.append((prose[start : start + length], dice.randrange(4, 24)))
    alone = [engine.generate([prompt], limit)[0] for prompt, limit in requests]
    before = engine.stats["prompt_cuts"]
    waiting = list(enumerate(requests))
    ids: dict[str, int] = {}
    together: dict[int, list[int]] = {}
    while waiting or engine.llm.llm_engine.has_unfinished_requests():
        for index, (prompt, limit) in waiting[:3]:
            request_id = engine.add(prompt, limit)
            ids[engine.caller_id[request_id]] = index
        waiting = waiting[3:]
        for output in engine.llm.llm_engine.step():
            if output.finished:
                together[ids[output.request_id]] = list(output.outputs[0].token_ids)
    assert [together[i] for i in range(64)] == alone
    compressed = sum(len(prompt) > BUDGET for prompt, _ in requests)
    assert 0 < compressed < 64
    assert engine.stats["prompt_cuts"] - before == compressed

"""Everything at once on a real model: nothing leaks, nothing waits for ever, answers stay the same.

Prompts from one token to beyond one step, shared prefixes, requests that are compressed, that are
not, and that are cut while they generate, priorities, aborts, and a pool so small that requests
are preempted and replayed. Each answer must be the one that its request gets alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import Engines, page_bytes

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 96
LENGTHS = [1, 5, 32, 64, 97, 128, 200, 256, 300, 420, 511, 513, 700, 1000]
CONFIG = {
    "prefill": "streaming",
    "stream_chunk": 256,
    "stream_budget": 160,
    "decode_budget": BUDGET,
    "decode_buffer": 32,
    "reserve_tokens": 16,
    "allow": {"decode": True},
}


@dataclass(frozen=True)
class Ask:
    """One kind of request."""

    prompt: tuple[int, ...]
    max_tokens: int
    cut_while_decoding: bool

    @property
    def params(self) -> dict[str, Any]:
        return setting(decode=self.cut_while_decoding)


@pytest.mark.parametrize(
    ("requests", "kinds", "longest"),
    [(30, 14, 40), pytest.param(2000, 250, 200, marks=pytest.mark.slow)],
)
def test_every_answer_is_the_one_produced_alone(
    engines: Engines, prose: list[int], requests: int, kinds: int, longest: int
) -> None:
    settings: dict[str, Any] = {
        "config": CONFIG,
        "max_model_len": 1536,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 12,
        "scheduling_policy": "priority",
    }
    small = engines.get("cake", BUDGET, kv_cache_memory_bytes=22 * page_bytes(), **settings)
    large = engines.get("cake", BUDGET, **settings)
    dice = random.Random(7)
    asks = _asks(dice, prose, kinds, longest)
    alone = [large.generate([a.prompt], a.max_tokens, **a.params)[0] for a in asks]
    wanted = [dice.randrange(kinds) for _ in range(requests)]
    answers, aborted, preemptions = _run(small, dice, asks, wanted)
    assert len(answers) + len(aborted) == requests
    for index, answer in answers.items():
        ask = asks[wanted[index]]
        expected = alone[wanted[index]]
        assert answer == expected, f"request {index}: {len(ask.prompt)} prompt tokens"
    small.check()
    # Nothing of what this test is about failed to happen.
    stats = small.stats
    assert aborted
    # A few short answers find room as they grow; thousands of long ones do not.
    assert preemptions > requests // 100 or requests < 1000
    assert all(stats[f"prefills_{path}"] > 0 for path in ("full", "cascade", "streaming"))
    assert stats["decode_cuts"] > 0
    assert stats["chunk_cuts"] > 0
    assert stats["plain_steps"] > 0


def _asks(dice: random.Random, prose: Sequence[int], kinds: int, longest: int) -> list[Ask]:
    asks = []
    for index in range(kinds):
        length = LENGTHS[index % len(LENGTHS)] + dice.choice([0, 0, 1, 17])
        # Four documents, so that many share a prefix; the question at the end is their own.
        document = dice.randrange(4) * 300
        question = dice.randrange(2500, 4000)
        own = min(40, length // 2)
        prompt = [*prose[document : document + length - own], *prose[question : question + own]]
        asks.append(
            Ask(tuple(prompt), dice.choice([1, 8, longest // 2, longest]), dice.random() < 0.7)
        )
    return asks


def _run(
    engine: Engine, dice: random.Random, asks: Sequence[Ask], wanted: Sequence[int]
) -> tuple[dict[int, list[int]], set[int], int]:
    """Answers by request, aborted requests, and how often one was preempted."""
    answers: dict[int, list[int]] = {}
    aborted: set[int] = set()
    names: dict[str, int] = {}
    live: dict[int, str] = {}
    waiting = list(range(len(wanted)))
    preemptions, idle = 0, 0
    while waiting or engine.llm.llm_engine.has_unfinished_requests():
        # Bursts, so that the pool is now empty and now overrun.
        for _ in range(dice.choice([0, 0, 1, 4]) if len(live) < 30 else 0):
            if waiting:
                index = waiting.pop(0)
                ask = asks[wanted[index]]
                request_id = engine.add(
                    ask.prompt, ask.max_tokens, priority=dice.randrange(3), **ask.params
                )
                names[engine.caller_id[request_id]] = index
                live[index] = request_id
        if live and dice.random() < 0.02:
            index = dice.choice(sorted(live))
            engine.abort(live.pop(index))
            aborted.add(index)
        before = {r.request_id: r.num_preemptions for r in engine.scheduler.requests.values()}
        outputs = engine.llm.llm_engine.step()
        for request in engine.scheduler.requests.values():
            preemptions += request.num_preemptions - before.get(request.request_id, 0)
        idle = 0 if outputs or not live else idle + 1
        assert idle < 200, "no request gets on"
        for output in outputs:
            index = names[output.request_id]
            if output.finished and index not in aborted:
                answers[index] = list(output.outputs[0].token_ids)
                live.pop(index, None)
    return answers, aborted, preemptions

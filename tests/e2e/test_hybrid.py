"""Sliding-window hybrids: only the global layers are compressed (Gemma-3-270m, 3 of 18)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cut_model import NUM_TOKENS
from tests.e2e.engine import Engine
from tests.e2e.harness import Engines, hybrid_model

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 128
R = BUDGET // BLOCK
GLOBAL, SIDE, WINDOW = 3, 5, 512
# Longer prompts take two steps; the window is shorter than the longest.
SETTINGS: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "max_model_len": 1024,
}
CONFIG = {"decode_budget": BUDGET, "decode_buffer": 64, "reserve_tokens": 0}
SMALL_POOL = 250 * GLOBAL * BLOCK * 2 * 256 * 4
"""About what start-up asks for: 36 blocks of the arena, 33 of each other group."""
# Long enough that a window slides while it generates, a block border, shorter than a block.
LENGTHS = (910, 500, 64, 20)


@pytest.fixture(scope="module")
def text(novel: str) -> list[int]:
    """Several thousand tokens of English prose, folded into those that this model knows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hybrid_model())
    return [token % NUM_TOKENS for token in tokenizer(novel)["input_ids"]]


def hybrid(
    engines: Engines, method: str | None = None, budget: int | None = None, **settings: Any
) -> Engine:
    return engines.get(method, budget, model=hybrid_model(), **SETTINGS, **settings)


@pytest.fixture
def cake(engines: Engines) -> Engine:
    return hybrid(engines, "cake", BUDGET, config=CONFIG)


def held(engine: Engine, request_id: str) -> tuple[int, list[int]]:
    """Blocks that a request holds in the compressed group, and in each of the others."""
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    beside = [
        sum(not block.is_null for block in manager.req_to_blocks[request_id])
        for manager in managers
        if manager is not engine.manager
    ]
    return len(engine.blocks_of(request_id)), beside


def ask(engine: Engine, prompt: list[int], max_tokens: int = 12) -> tuple[list[int], int]:
    return engine.ask(prompt, max_tokens)


def forget(engine: Engine) -> None:
    """Empty the prefix cache."""
    assert engine.llm.reset_prefix_cache()


def test_scatter_equals_plain(engines: Engines, text: list[int]) -> None:
    """Every token kept, pages moved between the global layers: the output is plain vLLM's."""
    plain, scatter = hybrid(engines), hybrid(engines, "scatter")
    prompts = [text[17 * i : 17 * i + n] for i, n in enumerate(LENGTHS)]
    expected = plain.generate(prompts, 20)
    assert scatter.generate(prompts, 20) == expected
    assert scatter.stats["prompt_cuts"] == len(prompts)
    # The second time from the prefix cache, but for the observation window.
    answer, hits = ask(scatter, prompts[0])
    assert answer == expected[0][:12]
    assert hits == 864


def test_only_the_global_layers_are_cut(cake: Engine, text: list[int]) -> None:
    kept = cake.record_kept()
    name = cake.add(text[2000:2900], 40)
    peak, pages = 0, []
    for _ in cake.steps():
        if name not in cake.scheduler.requests:
            continue
        arena, beside = held(cake, name)
        peak = max(peak, arena)
        assert len(beside) == SIDE
        state = cake.manager.reservations.get(name)
        if state is not None and state.released:
            pages.append(cake.arena.used[:, cake.arena.slot(name)].copy())
            # The window's first token may be anywhere in its block.
            assert max(beside) <= -(-WINDOW // BLOCK) + 1
            assert arena <= R + 2
    assert peak == -(-900 // BLOCK) + R
    # With the first generated token every layer has a page more than the cut gave it.
    assert len(pages[0]) == GLOBAL
    assert pages[0].sum() == (R + 1) * GLOBAL
    assert pages[-1].sum() == (R + 2) * GLOBAL
    (layers,) = kept
    assert sum(len(heads[0]) for heads in layers) == GLOBAL * BUDGET
    assert len(layers) == GLOBAL


def test_a_prefix_hit_changes_no_answer(cake: Engine, text: list[int]) -> None:
    """Where a window's blocks before an earlier end are gone there is no hit, as in plain vLLM."""
    document = text[3000:3700]
    first, second = document + text[4000:4060], document + text[4100:4130]
    forget(cake)
    cold = [ask(cake, first), ask(cake, second), ask(cake, document)]
    # The windows before the ends of what is shared were not kept at first, but from then on.
    assert [hits for _, hits in cold] == [0, 0, 0]
    warm = [ask(cake, first), ask(cake, second), ask(cake, document)]
    assert [hits for _, hits in warm] == [704, 672, 640]
    alone = []
    for prompt in (first, second, document):
        forget(cake)
        alone.append(ask(cake, prompt)[0])
    assert [answer for answer, _ in cold] == [answer for answer, _ in warm] == alone


def test_no_token_after_a_cut_is_offered_to_others(cake: Engine, text: list[int]) -> None:
    """Not by sliding-window layers either: those tokens have seen a compressed cache."""
    forget(cake)
    prompt = text[4200:4400]
    answer, _ = ask(cake, prompt, 40)
    pool = cake.scheduler.kv_cache_manager.block_pool
    cached = [b for b in pool.blocks if b.block_hash is not None]
    # Full blocks of the prompt, in every group.
    assert len(cached) == (200 // BLOCK) * (1 + SIDE)
    longer = [*prompt, *answer, *text[4400:4440]]
    warm, hits = ask(cake, longer)
    assert hits == 192
    forget(cake)
    assert ask(cake, longer) == (warm, 0)


def test_a_replay_after_preemption_gives_the_same_answer(cake: Engine, text: list[int]) -> None:
    prompts = [text[4500:5100], text[5200:5400]]
    expected = cake.generate(prompts, 24)
    forget(cake)
    names = [cake.add(prompt, 24) for prompt in prompts]
    preempted = cake.count_preemptions()
    done: dict[str, list[int]] = {}
    for step, outputs in enumerate(cake.steps()):
        if step in (0, 8, 16):  # between its chunks, while it decodes, and once more
            cake.preempt(names[0])
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}
    assert preempted() == 3
    assert [done[cake.caller_id[name]] for name in names] == expected


def test_a_small_pool_serves_all(engines: Engines, cake: Engine, text: list[int]) -> None:
    """Requests wait or are replayed, generations are cut, and the answers are the same."""
    small = hybrid(engines, "cake", BUDGET, config=CONFIG, kv_cache_memory_bytes=SMALL_POOL)
    prompts = [text[31 * i : 31 * i + 430 + 10 * i] for i in range(3)]
    expected = cake.generate(prompts, 70)
    assert cake.stats["decode_cuts"] > 0
    preempted = small.count_preemptions()
    assert small.generate(prompts, 70) == expected
    assert preempted() > 0, "the pool was not small enough"

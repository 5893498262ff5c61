"""Prompts compressed while they run: the same result as after the step, in far fewer blocks."""

from typing import Any

import pytest

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import LAYERS, Engines, page_bytes

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 128
R = BUDGET // BLOCK
SMALLER = setting("cake", BUDGET)
"""For an engine of a larger budget."""
SHORT_OF_ROOM: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "kv_cache_memory_bytes": 40 * page_bytes(),
}


def paths(engines: Engines) -> tuple[Engine, Engine]:
    """Two engines that differ in where a prompt lies while it is computed."""
    full = engines.open(config={"prefill": "full"})
    return full, engines.open(config={"prefill": "cascade"})


@pytest.mark.parametrize(
    ("method", "config", "at_once"),
    [("cake", {}, 1), ("dynamickv", {}, 4), ("uniform", {}, 1), ("cake", {"faithful": True}, 1)],
)
def test_a_cascade_keeps_and_answers_what_the_full_path_does(
    engines: Engines, prose: list[int], method: str, config: dict[str, Any], at_once: int
) -> None:
    # Together with a prompt that fits the budget, so that rows of all kinds share a batch.
    prompts = [prose[:1000], prose[50:90], prose[700:1033]]
    found = []
    asked = setting(method, BUDGET, **config)
    for engine in paths(engines):
        kept = engine.record_kept()
        outputs = engine.complete(prompts, 24, logprobs=0, **asked)
        # Summed log-probabilities as well: not a single bit is different.
        answers = [(list(o.token_ids), o.cumulative_logprob) for o in outputs]
        paths_taken = [engine.stats[f"prefills_{path}"] for path in ("full", "cascade")]
        found.append((answers, kept[:2], paths_taken))
        engine.check()
    (full, full_kept, full_paths), (cascade, cascade_kept, cascade_paths) = found
    assert (full_paths, cascade_paths) == ([2, 0], [0, 2])
    assert len(full_kept) == 2
    assert cascade_kept == full_kept
    assert cascade == full
    _, held = paths(engines)[1].run_counting([prose[:1000]], 4, **asked)
    assert held[0] == R + -(-at_once * 32 // LAYERS)
    assert max(held[1:]) == R + 1


def test_a_prompt_whose_cache_does_not_fit_is_served_in_one_step(
    engines: Engines, prose: list[int]
) -> None:
    prompt = prose[:3500]
    needed = -(-len(prompt) // BLOCK)
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        engines.get(**SHORT_OF_ROOM)
    small = engines.get("cake", BUDGET, **SHORT_OF_ROOM)
    assert needed > 2 * small.total_blocks()
    # What vLLM's log says of maximum concurrency: one prompt at its peak, the others at R.
    peak = R + -(-4096 // (BLOCK * LAYERS))
    told = small.core.vllm_config.cache_config.kv_cache_max_concurrency
    assert told == pytest.approx(1 + (small.total_blocks() - peak) / R)
    (answer,), held = small.run_counting([prompt], 24)
    assert held[0] == R + -(-needed // LAYERS)
    assert max(held) <= R + -(-needed // LAYERS) + 2
    assert small.stats["prefills_cascade"] == 1
    large = engines.get(
        "cake",
        BUDGET,
        config={"prefill": "full"},
        **{**SHORT_OF_ROOM, "kv_cache_memory_bytes": 2**28},
    )
    assert large.generate([prompt], 24) == [answer]


def test_a_generation_ends_where_the_pool_does(engines: Engines, prose: list[int]) -> None:
    """What could never be held is the request's own error, or is not begun if it was not asked."""
    small = engines.get("cake", BUDGET, **SHORT_OF_ROOM)
    # Not imported with the module: the kernels' tests arrange for Triton's interpreter first.
    from vllm.exceptions import VLLMValidationError

    room = small.total_blocks() * BLOCK - 100
    with pytest.raises(VLLMValidationError, match=f"room for {room} generated tokens"):
        small.generate([prose[:100]], room + 1)
    outputs = small.generate([prose[:100]], 4096 - 100)
    assert len(outputs[0]) == room
    small.check()


def test_cached_blocks_are_used_as_they_are(engines: Engines, prose: list[int]) -> None:
    """Short prompts are left in the prefix cache, cascades are not."""
    full, cascade = paths(engines)
    for engine in (full, cascade):
        engine.generate([prose[:BUDGET]], 2, **SMALLER)
    prompt = prose[:900]
    found = [engine.ask(prompt, 16, **SMALLER) for engine in (cascade, cascade, full, full)]
    answer = found[0][0]
    whole = (900 - cascade.planner.window) // BLOCK * BLOCK
    assert found == [(answer, BUDGET)] * 2 + [(answer, BUDGET), (answer, whole)]
    _, held = cascade.run_counting([prompt], 2, **SMALLER)
    own = 29 - BUDGET // BLOCK
    assert held[0] == BUDGET // BLOCK + -(-own // LAYERS) + R


def test_auto_cascades_when_the_pool_has_no_room(engines: Engines, prose: list[int]) -> None:
    engine = engines.get("cake", BUDGET, kv_cache_memory_bytes=64 * page_bytes())
    prompts = [prose[37 * i : 37 * i + 800] for i in range(8)]
    outputs, held = engine.run_counting(prompts, 24)
    assert engine.stats["prefills_full"] > 0
    assert engine.stats["prefills_cascade"] > 0
    assert max(held) <= engine.total_blocks()
    assert outputs == engines.open().generate(prompts, 24, **SMALLER)
    engine.check()


def test_a_prompt_waits_for_a_step_that_holds_all_of_it(engines: Engines, prose: list[int]) -> None:
    """Two prompts of more than half a step each: one after the other, none of them in chunks."""
    engine = engines.get("cake", BUDGET, config={"prefill": "cascade"}, max_num_batched_tokens=1024)
    prompts = [prose[:700], prose[900:1600], prose[2000:2020]]
    assert engine.generate(prompts, 16) == engines.open().generate(prompts, 16, **SMALLER)
    assert engine.stats["prefills_cascade"] == 2


def test_books_add_up(engines: Engines, prose: list[int]) -> None:
    """What is reserved, held and freed at the end of a request."""
    engine = paths(engines)[1]
    engine.add(prose[:1000], 40, **SMALLER)
    steps = [engine.manager.block_gauges() for _ in engine.steps()]
    assert engine.stats["blocks_freed"] == -(-32 // LAYERS)
    assert engine.stats["prefills_cascade"] == 1
    # Before the last step, which ends it: the arena and two blocks of generated tokens.
    assert steps[-2].held == steps[-2].reserved == R + 2
    assert steps[-2].free == engine.total_blocks() - R - 2

"""Prompts compressed between their chunks: few blocks, however long the prompt."""

import pytest

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import Engines

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 128
WORKING = 192
CHUNK = 128
STEP = 256


def streaming(engines: Engines) -> Engine:
    return engines.get(
        "cake",
        BUDGET,
        config={"prefill": "streaming", "stream_chunk": CHUNK, "stream_budget": WORKING},
        max_num_batched_tokens=STEP,
    )


def test_blocks_do_not_depend_on_the_length_of_the_prompt(
    engines: Engines, prose: list[int]
) -> None:
    engine = streaming(engines)
    # The working budget and a chunk, and where the next cut's survivors go.
    bound = (2 * WORKING + CHUNK) // BLOCK
    for length in (700, 1500):
        before = engine.stats["chunk_cuts"]
        (answer,), held = engine.run_counting([prose[:length]], 36)
        assert len(answer) == 36
        assert max(held) == bound
        assert held[-2] == BUDGET // BLOCK + 2
        # One cut a chunk, from where there is something to evict up to the prompt's last window.
        cuts = [p for p in range(CHUNK, length - 31, CHUNK) if p > WORKING]
        assert engine.stats["chunk_cuts"] - before == len(cuts)
        engine.check()


def test_prompts_of_one_step_are_compressed_exactly(engines: Engines, prose: list[int]) -> None:
    engine, exact = streaming(engines), engines.open()
    prompts = [prose[:STEP], prose[200:400]]
    assert engine.generate(prompts, 24) == exact.generate(prompts, 24, **setting("cake", BUDGET))


def test_a_crowd_gets_the_same_answers_as_each_alone(engines: Engines, prose: list[int]) -> None:
    """Chunks end where they must, whatever room the other requests of a step leave."""
    engine = streaming(engines)
    prompts = [prose[100 * i : 100 * i + n] for i, n in enumerate((700, 40, 500, 900, 200))]
    alone = [engine.generate([prompt], 24)[0] for prompt in prompts]
    assert engine.generate(prompts, 24) == alone
    engine.check()


def test_only_what_was_computed_exactly_is_left_in_the_prefix_cache(
    engines: Engines, prose: list[int]
) -> None:
    engine = streaming(engines)
    first = 2 * CHUNK  # of the cuts: the one before it has nothing to evict
    found = [engine.ask(prose[:700], 8) for _ in range(2)]
    answer = found[0][0]
    # The window of the first cut is computed again.
    assert found == [(answer, 0), (answer, first - BLOCK)]

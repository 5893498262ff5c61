"""What is set aside at start: the least pool, the block table's rows; and what fits a pool."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.planning.test_config import config
from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits
from vllm_kvcompress.planning.config import KVCompressionConfig


@st.composite
def planners(draw: st.DrawFn) -> BlockPlanner:
    """Every option at once, in numbers small enough to try all prompts."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    window = draw(st.integers(2, 12))
    budget = st.integers(window + size, window + size + 20)
    given: dict[str, Any] = {
        "method": draw(st.sampled_from(["uniform", "cake", "dynamickv", "scatter"])),
        "window": window,
        "prefill": draw(st.sampled_from(["auto", "full", "cascade", "streaming"])),
        "budget": draw(budget | st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.9, 0.95])),
    }
    if given["prefill"] == "streaming" and draw(st.booleans()):
        given["stream_chunk"] = draw(st.integers(max(window, size), 60))
    if draw(st.booleans()):
        given["decode_budget"] = draw(budget)
        given["decode_buffer"] = window + draw(st.integers(0, 10))
    layers, one_step = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(0, 60))
    try:
        return BlockPlanner(KVCompressionConfig.parse(given), size, EngineLimits(layers, one_step))
    except ValueError:
        assume(False)
        raise


@settings(max_examples=200)
@given(planners(), st.integers(1, 120))
def test_the_least_pool_serves_every_prompt(planner: BlockPlanner, longest: int) -> None:
    needed = [planner.peak_blocks(prompt, prompt + 1) for prompt in range(1, longest + 1)]
    least = planner.least_pool(longest)
    assert max(needed) <= least
    if planner.config.decode_budget is None:
        assert least == max(needed)  # and wastes nothing


@pytest.mark.parametrize("budget", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("one_step", [0, 34, 50])
def test_the_least_pool_serves_every_prompt_of_a_share(budget: float, one_step: int) -> None:
    # All of them: the lengths at which rounding makes a difference are rare. Of those of 9 blocks,
    # up to 34 tokens go through a workspace and 36 stay whole at 0.9; only 35 take blocks twice.
    planner = BlockPlanner(config("uniform", budget, window=8), 4, EngineLimits(4, one_step))
    needed = 0
    for longest in range(1, 200):
        needed = max(needed, planner.peak_blocks(longest, longest + 1))
        assert planner.least_pool(longest) == needed


def test_the_least_pool_counts_prompts_that_take_two_steps_and_are_cut_but_once() -> None:
    # 55 tokens are one too many for a step and for a workspace, and one too few for a cut at 48.
    given = {"window": 3, "prefill": "streaming", "stream_budget": 24}
    planner = BlockPlanner(config("uniform", 23, **given), 8, EngineLimits(6, 54, lag=0))
    schedule = planner.schedule(55)
    assert schedule is not None
    assert [cut.position for cut in schedule.prefill_cuts] == [55]
    assert planner.peak_blocks(55, 56) == 7 + 3
    assert planner.least_pool(59) == 7 + 3


@settings(max_examples=200)
@given(planners(), st.integers(1, 100), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_a_request_is_given_as_many_tokens_as_fit_its_pool(
    planner: BlockPlanner, prompt: int, more: int, pool: int, decode: bool
) -> None:
    longest = prompt + more
    fitting = [
        tokens
        for tokens in range(prompt + 1, longest + 1)
        if planner.peak_blocks(prompt, tokens, decode) <= pool
    ]
    most = planner.most_tokens(prompt, longest, pool, decode)
    assert most == max(fitting, default=prompt)


@settings(max_examples=200)
@given(planners(), st.integers(1, 120))
def test_a_row_of_the_block_table_holds_all_that_is_ever_appended(
    planner: BlockPlanner, longest: int
) -> None:
    entries = planner.row_blocks(longest)
    for prompt in range(1, longest + 1):
        for decode in (False, True):
            schedule = planner.schedule(prompt, decode)
            if schedule is None:
                assert entries >= -(-longest // planner.block_size)
                continue
            for prefill_blocks in (None, planner.cascade_prefill_blocks(prompt)):
                assert entries >= schedule.blocks_for(
                    longest, released=0, prefill_blocks=prefill_blocks
                )


@settings(max_examples=200)
@given(planners(), st.integers(1, 120), st.integers(1, 200))
def test_maximum_concurrency_is_how_many_prompts_can_be_admitted_one_after_another(
    planner: BlockPlanner, length: int, pool: int
) -> None:
    schedule = planner.schedule(length, True)
    peak = planner.peak_blocks(length, length)
    held = peak if schedule is None else schedule.blocks_for(length, schedule.count(length))
    admitted, free = 0, pool
    while free >= peak:
        admitted, free = admitted + 1, free - held
    assert int(planner.concurrency(length, pool)) == admitted


@settings(max_examples=200)
@given(planners(), st.integers(1, 120), st.integers(1, 240), st.booleans(), st.data())
def test_the_number_of_blocks_stays_as_it_is_for_as_long_as_it_says(
    planner: BlockPlanner, prompt: int, tokens: int, decode: bool, data: st.DataObject
) -> None:
    schedule = planner.schedule(prompt, decode)
    assume(schedule is not None)
    assert schedule is not None
    prefill_blocks = data.draw(st.sampled_from([None, planner.cascade_prefill_blocks(prompt)]))
    released = data.draw(st.integers(0, schedule.count(tokens)))
    until = schedule.unchanged_until(tokens)
    assert until >= tokens
    needed = schedule.blocks_for(tokens, released, prefill_blocks)
    for later in range(tokens, until + 1):
        assert schedule.blocks_for(later, released, prefill_blocks) == needed
    # And it is no less than a block's worth, but for a cut.
    assert until - tokens < planner.block_size

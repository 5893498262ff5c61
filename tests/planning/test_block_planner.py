"""What the planner says: when requests are cut, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.test_config import config
from vllm_kvcompress.methods import Cake, DynamicKV, Method, Random, Scatter, Uniform, get_method
from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits, layers_between_cuts
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule, Cut
from vllm_kvcompress.planning.config import KVCompressionConfig


def schedule_of(planner: BlockPlanner, prompt: int, decode: bool = True) -> CompressionSchedule:
    schedule = planner.schedule(prompt, decode)
    assert schedule is not None
    return schedule


# --- what a prompt holds after its prefill -------------------------------------------------------


def test_prompts_within_the_kept_blocks_stay_as_they_are() -> None:
    planner = BlockPlanner(config("uniform", 100), 32)
    assert planner.budget_blocks(5000) == 4
    assert [planner.prompt_cut(n) for n in (1, 100, 128)] == [None, None, None]
    assert [planner.schedule(n) for n in (1, 100, 128)] == [None, None, None]
    assert planner.prompt_cut(129) == Cut(129, 4)
    assert schedule_of(planner, 129).prefill_cuts == (Cut(129, 4),)
    assert planner.peak_blocks(100, 150) == 5


def test_a_share_of_the_prompt_is_rounded_up_and_never_below_what_a_method_needs() -> None:
    planner = BlockPlanner(config("uniform", 0.25), 32)
    assert planner.budget_blocks(4096) == 32
    assert planner.budget_blocks(4097) == 33
    assert planner.budget_blocks(10) == 2  # window 32 + one block
    assert planner.prompt_cut(64) is None
    assert planner.prompt_cut(65) == Cut(65, 2)


@given(st.integers(1, 300), st.sampled_from([1, 16, 32]))
def test_keeping_everything_takes_as_many_blocks_and_fills_the_last_page(
    prompt: int, size: int
) -> None:
    planner = BlockPlanner(config("scatter"), size)
    cut = planner.prompt_cut(prompt)
    assert cut is not None
    assert cut.blocks == -(-prompt // size)
    assert cut.blocks * size - cut.slack == prompt
    schedule = schedule_of(planner, prompt)
    assert schedule.tail_blocks(1, prompt + cut.slack) == 0
    assert schedule.tail_blocks(1, prompt + cut.slack + 1) == 1


budgets = st.integers(40, 400) | st.floats(0.01, 0.99)


@given(budgets, st.integers(1, 2000))
def test_evicting_plans_keep_less_than_the_prompt_and_leave_no_slack(
    budget: float, prompt: int
) -> None:
    planner = BlockPlanner(config("uniform", budget, window=24), 16)
    cut = planner.prompt_cut(prompt)
    kept = planner.budget_blocks(prompt) * 16
    if cut is None:
        assert prompt <= kept
        return
    assert cut == Cut(prompt, kept // 16)
    assert planner.window + 1 <= kept < prompt
    assert schedule_of(planner, prompt).prefill_cuts == (cut,)


# --- cascades ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layers", "expected"),
    [
        (Cake(), 10, 1),
        (Cake(every=4), 10, 4),
        (Cake(every=4), 3, 3),
        (Cake(every=0), 10, 10),
        (Cake(faithful=True), 10, 1),
        (DynamicKV(), 10, 4),
        (DynamicKV(every=3), 10, 3),
        (DynamicKV(every=12), 10, 10),
        (Uniform(), 10, 1),
        (Random(), 10, 1),
        (Scatter(), 10, 10),
        # Of compositions the allocator counts.
        (get_method("cake", {"scorer": "keydiff", "every": 4}), 10, 4),
        (get_method("snapkv", {"allocator": {"method": "dynamickv", "every": 2}}), 10, 2),
        (get_method("cake", {"allocator": "pyramidkv"}), 10, 1),
        (get_method("cake", {"scorer": "snapkv", "every": 0}), 10, 10),
    ],
)
def test_layers_whose_whole_cache_is_held_at_one_time(
    method: Method, layers: int, expected: int
) -> None:
    assert layers_between_cuts(method, layers) == expected


def test_a_workspace_is_used_where_it_saves_blocks() -> None:
    limits = EngineLimits(num_layers=4, one_step_tokens=200)
    planner = BlockPlanner(config("cake", 16, window=8), 4, limits)
    # 25 pages of one layer lie in 7 blocks of 4 layers.
    assert planner.cascade_prefill_blocks(100) == 7
    assert planner.cascade_prefill_blocks(100, cached_blocks=10) == 10 + 4
    assert planner.cascade_prefill_blocks(100, cached_blocks=23) == 24
    # 24 + 1 are the prompt's own 25.
    assert planner.cascade_prefill_blocks(100, cached_blocks=24) is None
    assert planner.cascade_prefill_blocks(16) is None  # never cut
    assert planner.cascade_prefill_blocks(200) == 13
    assert planner.cascade_prefill_blocks(201) is None  # does not run in one step
    assert planner.cascade_prefill_blocks(204, cached_blocks=1) == 1 + 13
    every_two = BlockPlanner(config("cake", 16, window=8, every=2), 4, limits)
    assert every_two.cascade_prefill_blocks(100) == 13
    assert not BlockPlanner(config("cake", 16, window=8, every=0), 4, limits).can_cascade
    assert not BlockPlanner(config("scatter"), 4, limits).can_cascade
    assert not BlockPlanner(config("cake", 16, window=8), 4, EngineLimits(num_layers=4)).can_cascade


@given(
    st.integers(1, 12), st.integers(0, 5), st.integers(1, 300), st.integers(0, 80), st.booleans()
)
def test_a_workspace_holds_all_layers_between_two_cuts(
    layers: int, every: int, prompt: int, cached: int, equal: bool
) -> None:
    method = config("uniform", 16, window=8) if equal else config("cake", 16, window=8, every=every)
    planner = BlockPlanner(method, 4, EngineLimits(layers, one_step_tokens=200))
    whole = -(-prompt // 4)
    cached = min(cached, (prompt - 1) // 4)
    prefill_blocks = planner.cascade_prefill_blocks(prompt, cached)
    if prefill_blocks is None:
        saves = cached + planner.workspace_blocks(whole - cached) < whole
        one_step = planner.can_cascade and prompt - cached * 4 <= 200
        assert not (saves and one_step and prompt > 16)
        return
    assert cached < prefill_blocks < whole
    pages = planner.layers_per_division * (whole - cached)
    assert (prefill_blocks - cached) * layers >= pages > (prefill_blocks - cached - 1) * layers


@pytest.mark.parametrize(
    "given",
    [
        {"method": "scatter"},
        {"method": "cake", "every": 0},
        {"method": "dynamickv", "every": 4},
    ],
)
def test_a_cascade_that_gains_nothing_is_refused(given: dict[str, Any]) -> None:
    parsed = KVCompressionConfig.parse({"budget": 64, "prefill": "cascade", **given})
    limits = EngineLimits(num_layers=4, one_step_tokens=100)
    expected = rf"^kv_compression: prefill cascade gains nothing with {given['method']}.* to auto$"
    with pytest.raises(ValueError, match=expected):
        BlockPlanner(parsed, 16, limits)
    # Left to select_survivors, the engine does without.
    automatic = KVCompressionConfig.parse({"budget": 64, **given})
    assert BlockPlanner(automatic, 16, limits).cascade_prefill_blocks(90) is None
    BlockPlanner(config("cake", 64, prefill="cascade"), 16, limits)


def test_the_smallest_peak_of_a_prompt_is_through_a_workspace_where_it_may_be() -> None:
    limits = EngineLimits(num_layers=5, one_step_tokens=200)
    peaks = [
        BlockPlanner(config("cake", 16, window=8, prefill=prefill), 4, limits).peak_blocks(100, 101)
        for prefill in ("auto", "cascade", "full")
    ]
    assert peaks == [5 + 4 + 1, 5 + 4 + 1, 25 + 4 + 1]
    waits = BlockPlanner(config("cake", 16, window=8), 4, EngineLimits(5, 200, lag=0))
    assert waits.peak_blocks(100, 101) == 5 + 4


# --- cuts between chunks -------------------------------------------------------------------------


def streaming(budget: int, size: int, limits: EngineLimits, **options: Any) -> BlockPlanner:
    return BlockPlanner(config("uniform", budget, prefill="streaming", **options), size, limits)


@settings(max_examples=300)
@given(
    size=st.sampled_from([1, 4, 16]),
    window=st.integers(1, 24),
    extra=st.integers(0, 60),
    more=st.none() | st.integers(0, 60),
    longer=st.integers(0, 90),
    one_step=st.integers(0, 150),
    prompt=st.integers(1, 700),
)
def test_long_prompts_are_cut_between_chunks(
    size: int, window: int, extra: int, more: int | None, longer: int, one_step: int, prompt: int
) -> None:
    budget = window + size + extra
    working = 2 * budget if more is None else budget + more
    gap = max(window, size)
    chunk = gap + size - 1 + longer
    options: dict[str, Any] = {"window": window, "stream_chunk": chunk}
    if more is not None:
        options["stream_budget"] = working
    planner = streaming(budget, size, EngineLimits(3, one_step), **options)
    schedule = planner.schedule(prompt)
    if prompt <= -(-budget // size) * size:
        assert schedule is None
        return
    assert schedule is not None
    *between, last = schedule.prefill_cuts
    assert last == Cut(prompt, planner.budget_blocks(prompt))
    assert planner.streams(prompt) == (prompt > one_step)
    chunk, blocks = chunk - chunk % size, -(-working // size)
    wanted = range(chunk, prompt - gap + 1, chunk) if prompt > one_step else range(0)
    assert [cut.position for cut in between] == [p for p in wanted if p > blocks * size]
    # Nothing is cut that has nothing to give, and no two cuts look at the same queries.
    held, before = 0, 0
    for cut in schedule.prefill_cuts:
        held += cut.position - before
        assert held > cut.blocks * size
        assert not before or cut.position - before >= gap
        assert cut.moves
        assert cut.blocks == (blocks if cut in between else last.blocks)
        held, before = cut.blocks * size, cut.position


def test_chunks_are_as_long_as_a_step_unless_told_otherwise() -> None:
    def first(limits: EngineLimits, **options: Any) -> int:
        return schedule_of(streaming(64, 16, limits, **options), 9000).first

    assert first(EngineLimits(3, 1000)) == 992
    assert first(EngineLimits(3)) == 2048
    assert first(EngineLimits(3, 1000), stream_chunk=300) == 288
    # Not before there is something to evict: twice the budget, or as many as asked for.
    assert first(EngineLimits(3, 96)) == 192
    assert first(EngineLimits(3, 96), stream_budget=64) == 96


@pytest.mark.parametrize(("chunk", "size", "least"), [(47, 16, 33), (33, 34, 34), (20, 1, 33)])
def test_chunks_shorter_than_a_window_or_a_block_are_refused(
    chunk: int, size: int, least: int
) -> None:
    with pytest.raises(ValueError, match=f"stream_chunk {chunk} is too small.* {least} tokens$"):
        streaming(100, size, EngineLimits(3, 1000), window=33, stream_chunk=chunk)
    streaming(100, size, EngineLimits(3, 1000), window=33, stream_chunk=3 * size + 33)


@pytest.mark.parametrize("lag", [0, 1])
def test_blocks_of_a_prompt_cut_between_chunks_do_not_grow_with_it(lag: int) -> None:
    planner = streaming(64, 16, EngineLimits(3, 256, lag))
    peaks = {planner.peak_blocks(prompt, prompt + 1) for prompt in range(1000, 2300)}
    # Survivors of one cut, then a chunk and its survivors; and the next before it is processed.
    assert max(peaks) == 8 + (16 + 8) * (1 + lag)
    assert planner.least_pool(3000) == max(peaks)
    whole = BlockPlanner(config("uniform", 64), 16, EngineLimits(3, 256, lag))
    assert whole.peak_blocks(6000, 6001) > 375


# --- cuts while generating -----------------------------------------------------------------------


@settings(max_examples=300)
@given(
    size=st.sampled_from([1, 4, 16]),
    window=st.integers(1, 24),
    extra=st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 30)),
    prompt=st.integers(1, 300),
)
def test_generated_tokens_are_cut_back_to_their_budget(
    size: int, window: int, extra: tuple[int, int, int], prompt: int
) -> None:
    least = window + size
    options = {"decode_budget": least + extra[1], "decode_buffer": window + extra[2]}
    planner = BlockPlanner(config("uniform", least + extra[0], window=window, **options), size)
    schedule = schedule_of(planner, prompt)
    blocks = -(-(least + extra[1]) // size)
    buffer = -(-(window + extra[2]) // size) * size
    first = planner.prompt_cut(prompt)
    held = first.blocks * size if first else prompt
    home = first.blocks if first else 0
    number = len(schedule.prefill_cuts)
    for tokens in range(prompt + 1, prompt + 400):
        held += 1
        if schedule.count(tokens) == number:
            continue
        number += 1
        cut = schedule.cut(number)
        before = schedule.cut(number - 1).position if number > 1 else prompt
        assert cut.position == tokens
        assert cut.blocks == blocks
        # Its queries are all from after the last cut, and it has something to evict.
        assert tokens - before >= buffer >= window
        full = blocks * size + buffer
        assert held == full or (held > full and tokens - before == buffer)
        # What already is where it shall stay does not move.
        assert cut.moves == (home != blocks)
        held, home = blocks * size, blocks
    assert number > len(schedule.prefill_cuts)
    # Left alone, the request is cut at its prompt's end or never.
    without = planner.schedule(prompt, decode=False)
    assert (without is None) == (first is None)
    assert without is None or (
        without.decode_cuts is None and without.prefill_cuts == schedule.prefill_cuts
    )


def test_a_request_that_is_cut_while_it_generates_never_outgrows_its_pool() -> None:
    options = {"window": 8, "decode_budget": 32, "decode_buffer": 16}
    planner = BlockPlanner(config("uniform", 32, **options), 4, EngineLimits(3, 1000, lag=0))
    assert planner.most_tokens(100, 100_000, pool_blocks=25 + 8) == 100_000
    # One that asked to be left alone ends with the pool: 8 blocks kept, the rest for its tokens.
    assert planner.most_tokens(100, 100_000, pool_blocks=25 + 8, decode=False) < 100 + 33 * 4
    assert planner.peak_blocks(100, 100_000, decode=False) > 20_000

"""Which requests are admitted when: the choice of prefill, and what is reserved."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from tests.support.scheduling import (
    BOTH,
    SIZE,
    AnyScheduler,
    Engine,
    configure,
    smallest_pool,
)
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaAsyncScheduler, ArenaScheduler

# --- cascade: a prompt in a workspace that its layers share ---------------------------------------


@BOTH
@pytest.mark.parametrize("prompt", [17, 64, 100, 160])
def test_a_cascade_holds_a_layers_share_of_the_prompt_for_one_step(
    deep: Path, cls: AnyScheduler, prompt: int
) -> None:
    engine = Engine(cls, configure(deep, prefill="cascade"), 60)
    engine.add("a", prompt, max_tokens=30)
    engine.schedule()
    workspace = -(-math.ceil(prompt / SIZE) // 8)
    assert engine.chunks["a"] == [(0, prompt)]
    assert engine.held("a") == engine.total - engine.free == workspace + 2
    growth = 0
    if cls is ArenaAsyncScheduler:
        engine.schedule()  # the first decode step, planned before the cut has been processed
        growth = 1
        assert engine.held("a") == workspace + 2 + growth
    assert engine.held("a") == engine.planner.peak_blocks(prompt, prompt + 1)
    assert engine.held("a") <= 2 + math.ceil(prompt / 8 / SIZE) + 1 + growth
    engine.process()
    engine.schedule()
    assert engine.held("a") == 2 + 1
    engine.run()
    assert engine.answers["a"] == 30


@BOTH
@pytest.mark.parametrize("prefill", ["auto", "cascade"])
def test_a_prompt_that_never_fits_the_pool_as_a_whole_is_served(
    deep: Path, cls: AnyScheduler, prefill: str
) -> None:
    config = configure(deep, prefill=prefill)
    engine = Engine(cls, config, smallest_pool(config, cls))
    assert engine.total < 199 // SIZE
    for name in "abc":
        engine.add(name, 199, max_tokens=1)
    engine.run(limit=20)
    assert engine.arena.counters.prefills["cascade"] == 3
    assert engine.preemptions == 0


@BOTH
@pytest.mark.parametrize(
    ("prefill", "spare", "path"),
    [("auto", 0, "full"), ("auto", -1, "cascade"), ("full", 0, "full"), ("full", -1, None)],
)
def test_a_prompt_runs_whole_where_there_is_room(
    deep: Path, cls: AnyScheduler, prefill: str, spare: int, path: str | None
) -> None:
    engine = Engine(cls, configure(deep, prefill=prefill), 60)
    # The prompt, where its survivors go, and, if it is planned before those are counted free, a
    # block for the first generated token.
    engine.leave_free(13 + 2 + (cls is ArenaAsyncScheduler) + spare)
    engine.add("a", 100, max_tokens=5)
    engine.schedule()
    if path is None:
        assert engine.held("a") == 0
        return
    assert engine.held("a") == (13 if path == "full" else 2) + 2
    engine.run()
    assert engine.arena.counters.prefills[path] == 1
    assert engine.answers["a"] == 5


@BOTH
def test_a_cascade_waits_for_a_step_that_takes_it_whole(deep: Path, cls: AnyScheduler) -> None:
    config = configure(deep, prefill="cascade", max_num_batched_tokens=100)
    engine = Engine(cls, config, 60)
    engine.add("running", 10, max_tokens=20)
    engine.step()
    engine.add("fits", 99, max_tokens=20)
    engine.step()
    engine.add("whole step", 100, max_tokens=1)
    # It is next, so those that come later do not keep it waiting for ever.
    for index in range(5):
        engine.add(f"later{index}", 20, max_tokens=50)
    engine.run()
    assert engine.chunks["fits"][0] == (0, 99)
    assert engine.chunks["whole step"] == [(0, 100)]
    assert engine.preemptions == 0
    assert engine.answers["later4"] == 50


@BOTH
def test_a_cascade_uses_a_cached_prefix_as_it_is(deep: Path, cls: AnyScheduler) -> None:
    engine = Engine(cls, configure(deep, prefill="auto"), 60)
    document = list(range(64))
    engine.add("first", [*document, *[500] * 9], max_tokens=2)
    engine.step()
    cached = [block.block_id for block in engine.arena.req_to_blocks["first"][:8]]
    engine.run()
    growth = cls is ArenaAsyncScheduler
    engine.leave_free(8 + 1 + 2 + growth)  # cached, workspace for 5 blocks' share, survivors
    engine.add("second", [*document, *[600] * 36], max_tokens=2)
    engine.schedule()
    assert engine.chunks["second"] == [(64, 36)]
    blocks = engine.arena.req_to_blocks["second"]
    assert [block.block_id for block in blocks[:8]] == cached
    assert len(blocks) == 8 + 1 + 2
    # What the first question left in the cache beyond the document made room.
    assert engine.arena.counters.prefills["cascade"] == 1
    engine.process()
    engine.run()
    # The prefix is still there: it was read, never written.
    engine.add("third", [*document, *[700] * 3], max_tokens=1)
    engine.schedule()
    assert engine.chunks["third"][0] == (56, 11)  # less the window
    engine.process()
    engine.run()


@BOTH
def test_a_cached_prefix_too_long_for_the_pool_is_used_in_part(
    deep: Path, cls: AnyScheduler
) -> None:
    # Blocks: 12 for the prefix, 3 of workspace for the rest and 2 for survivors are more than the
    # 16 there are; 11 and 3 and 2 are not.
    growth = cls is ArenaAsyncScheduler
    engine = Engine(cls, configure(deep, prefill="auto", max_len=300), 16 + growth + 1)
    document = list(range(96))
    engine.add("first", document, max_tokens=1)
    engine.run()
    assert engine.arena.counters.prefills["full"] == 1
    engine.add("second", [*document, *[600] * 180], max_tokens=1)
    engine.run(limit=10)
    assert engine.chunks["second"] == [(88, 188)]


@BOTH
def test_a_workspace_is_never_hashed(deep: Path, cls: AnyScheduler) -> None:
    for prefill, start in (("cascade", 0), ("full", 96)):
        engine = Engine(cls, configure(deep, prefill=prefill), 60)
        prompt = list(range(100))
        engine.add("first", prompt, max_tokens=20)
        engine.run()
        engine.add("again", prompt, max_tokens=20)
        engine.run()
        assert engine.chunks["again"][0] == (start, 100 - start)


@BOTH
@pytest.mark.parametrize(
    ("prefill", "step", "chunks"),
    [("cascade", 1000, [(0, 100)]), ("full", 64, [(0, 64), (64, 36)])],
    ids=["cascade", "full"],
)
def test_a_preempted_prompt_is_cut_at_its_end_and_replayed_as_before(
    deep: Path, cls: AnyScheduler, prefill: str, step: int, chunks: list[tuple[int, int]]
) -> None:
    config = configure(
        deep, prefill=prefill, max_num_batched_tokens=step, enable_prefix_caching=False
    )
    engine = Engine(cls, config, 80)
    engine.add("a", 100, max_tokens=40)
    for _ in range(15):
        engine.step()
    known = engine.throw_out("a")
    assert known > 100 + SIZE
    assert engine.held("a") == 0
    assert "a" not in engine.arena.reservations
    for _ in chunks:
        engine.step()
    engine.schedule()
    assert engine.chunks["a"][: len(chunks) + 1] == [*chunks, (100, known - 100)]
    assert engine.arena.counters.prefills[prefill] == 2
    engine.process()
    engine.run()
    assert engine.answers["a"] == 40


# --- streaming: a prompt that is cut between its chunks -------------------------------------------


@BOTH
def test_a_streamed_prompt_holds_as_much_however_long_it_is(deep: Path, cls: AnyScheduler) -> None:
    held = []
    for prompt in (200, 2000):
        config = configure(
            deep, prefill="streaming", stream_chunk=40, max_num_batched_tokens=64, max_len=2500
        )
        engine = Engine(cls, config, 60)
        engine.add("a", prompt, max_tokens=20)
        most = 0
        while engine.scheduler.requests:
            engine.step()
            most = max(most, engine.held("a"))
        held.append(most)
        assert engine.arena.counters.prefills["streaming"] == 1
        ends = [start + count for start, count in engine.chunks["a"] if start < prompt]
        assert ends[-1] == prompt
        # The second chunk cannot be cut before there is something to evict.
        assert set(range(40, prompt - SIZE, 40)) <= set(ends)
    assert held[0] == held[1]


@BOTH
def test_a_streamed_prompt_leaves_its_first_chunk_in_the_cache(
    deep: Path, cls: AnyScheduler
) -> None:
    config = configure(
        deep, prefill="streaming", stream_chunk=48, max_num_batched_tokens=64, max_len=500
    )
    engine = Engine(cls, config, 60)
    prompt = list(range(300))
    engine.add("first", prompt, max_tokens=5)
    engine.run()
    engine.add("again", prompt, max_tokens=5)
    engine.run()
    # Later tokens have seen what the first cut left; its window has to be computed anew.
    assert engine.chunks["again"][0] == (40, 8)


# --- decode budget -------------------------------------------------------------------------------


@BOTH
def test_a_long_generation_holds_bounded_blocks_unless_its_request_says_no(
    deep: Path, cls: AnyScheduler
) -> None:
    config = configure(deep, decode_budget=32, decode_buffer=16, max_len=1000)
    engine = Engine(cls, config, 200)
    for name, decode in (("cut", True), ("default", None), ("kept", False)):
        engine.add(name, 60, max_tokens=600, decode=decode)
    most = Counter[str]()
    while engine.scheduler.requests:
        engine.step()
        for name in engine.answers:
            state = engine.arena.reservations.get(name)
            if state is not None and state.released:
                most[name] = max(most[name], engine.held(name))
    # Survivors, what is generated between two cuts, and once both, where the first cut moves them.
    assert most["cut"] == most["default"]
    assert most["cut"] <= 2 + 4 + 4 + (2 if cls is ArenaAsyncScheduler else 0)
    assert most["kept"] == 2 + math.ceil(599 / SIZE)
    assert set(engine.answers.values()) == {600}


@BOTH
def test_a_replay_is_cut_where_it_was_the_first_time(deep: Path, cls: AnyScheduler) -> None:
    config = configure(deep, decode_budget=24, decode_buffer=16, max_len=300)
    engine = Engine(cls, config, 60)
    request = engine.add("a", 60, max_tokens=150)
    while request.num_output_tokens < 100:
        engine.step()
    known = engine.throw_out("a")
    engine.run()
    schedule = engine.planner.schedule(60, True)
    assert schedule is not None
    cuts = [schedule.cut(number).position for number in range(1, schedule.count(known - 1) + 1)]
    assert len(cuts) == 6
    ends = [start + count for start, count in engine.chunks["a"]]
    assert ends[: len(cuts) + 1] == [*cuts, known]
    assert engine.answers["a"] == 150


# --- reservations -------------------------------------------------------------------------------


@BOTH
def test_blocks_that_others_keep_are_not_counted_on(deep: Path, cls: AnyScheduler) -> None:
    # A prompt that is never cut keeps two blocks, which a streamed one shares until its first cut.
    config = configure(
        deep,
        prefill="streaming",
        stream_chunk=16,
        stream_budget=16,
        max_num_batched_tokens=64,
        max_len=300,
    )
    engine = Engine(cls, config, 40)
    document = list(range(16))
    engine.add("keeps", document, max_tokens=7)
    engine.step()
    prompt = [*document, *[500] * 100]
    need = engine.planner.peak_blocks(116, 117)
    engine.leave_free(need - 1)
    engine.add("shares", prompt, max_tokens=3)
    engine.step()
    assert engine.chunks["shares"] == []
    engine.run()
    assert engine.chunks["shares"][0][0] == 16
    assert engine.preemptions == 0


def test_a_newcomer_pays_for_what_a_running_prompt_will_not_get_back(deep: Path) -> None:
    for spare, admitted in ((6, False), (7, True)):
        engine = Engine(ArenaScheduler, configure(deep, max_len=300), 60)
        engine.leave_free(15 + spare)
        document = list(range(100))
        resumed = engine.add("resumed", document, max_tokens=150)
        while resumed.num_output_tokens < 127:
            engine.step()
        engine.preempt("resumed")
        # It will hold 13 blocks of prompt and 2 for survivors, then these and 16 for its answer.
        engine.add("shares", document[:16], max_tokens=1)
        engine.add("next", 9, max_tokens=1)
        scheduled = engine.schedule().num_scheduled_tokens
        assert engine.held("resumed") == 15
        # One of its 13 is shared now and does not come back: 4 are missing instead of 3.
        assert engine.arena.reservations["resumed"].outstanding == 4
        assert engine.held("shares") == 2
        assert ("next" in scheduled) is admitted
        engine.process()
        engine.run()
        assert engine.preemptions == 1, "the test's own"


@BOTH
def test_room_for_an_answer_is_kept_from_the_start(deep: Path, cls: AnyScheduler) -> None:
    preempted = {}
    for reserve in (0, 256):
        config = configure(deep, prefill="cascade", reserve_tokens=reserve, max_num_seqs=16)
        engine = Engine(cls, config, 60)
        for index in range(16):
            engine.add(f"r{index}", 60, max_tokens=60)
        engine.run()
        preempted[reserve] = engine.preemptions
        assert set(engine.answers.values()) == {60}
    assert preempted[0] > 0
    assert preempted[256] == 0


@BOTH
@pytest.mark.parametrize(("reserve", "max_tokens", "most"), [(40, 100, 40), (40, 9, 9), (0, 9, 1)])
def test_what_is_reserved_is_the_answer_or_the_setting(
    deep: Path, cls: AnyScheduler, reserve: int, max_tokens: int, most: int
) -> None:
    engine = Engine(cls, configure(deep, prefill="cascade", reserve_tokens=reserve), 60)
    engine.add("a", 60, max_tokens=max_tokens)
    engine.schedule()
    reservation = engine.arena.reservations["a"]
    assert reservation.reserved_until == 60 + most - 1
    assert engine.arena.block_gauges().reserved == engine.planner.peak_blocks(60, 60 + most)
    engine.process()
    engine.run()
    # What is never cut is admitted as in plain vLLM.
    engine.add("short", 10, max_tokens=max_tokens)
    engine.schedule()
    assert engine.arena.reservations["short"].reserved_until == 10
    engine.process()
    engine.run()

"""Who holds which blocks when, under vLLM's real schedulers."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.request import RequestStatus

from tests.support.scheduling import (
    BOTH,
    SIZE,
    WINDOW,
    AnyScheduler,
    Engine,
    configure,
    smallest_pool,
)
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaAsyncScheduler, ArenaScheduler

# --- blocks of one request -----------------------------------------------------------------------


def test_blocks_of_a_request_at_each_phase(folder: Path) -> None:
    engine = Engine(ArenaScheduler, configure(folder, max_num_batched_tokens=40), 60)
    engine.add("a", 100, max_tokens=30)
    engine.schedule()
    assert engine.held("a") == 5  # a chunk of 40: plain vLLM's blocks
    engine.process()
    engine.schedule()
    assert engine.held("a") == 10
    engine.process()
    assert engine.arena.reservations["a"].released == 0
    engine.schedule()
    assert engine.held("a") == 13 + 2  # the prompt's, and where its survivors go
    assert engine.free == engine.total - 15
    engine.process()
    held = []
    for _ in range(29):
        engine.schedule()
        held.append(engine.held("a"))
        engine.process()
    # The prompt's are back; one more for the first generated token and every eighth after it.
    assert held == [3] * 8 + [4] * 8 + [5] * 8 + [6] * 5
    assert engine.chunks["a"][:3] == [(0, 40), (40, 40), (80, 20)]
    assert engine.answers["a"] == 30
    assert not engine.scheduler.requests
    assert engine.free == engine.total


def test_the_prompt_is_not_released_while_the_compressing_step_is_in_flight(folder: Path) -> None:
    engine = Engine(ArenaAsyncScheduler, configure(folder), 60)
    engine.add("a", 100, max_tokens=30)
    engine.schedule()
    assert engine.held("a") == 13 + 2
    engine.schedule()  # the first decode step, planned before the compression has run
    assert engine.arena.reservations["a"].released == 0
    assert engine.held("a") == 13 + 2 + 1 == engine.planner.peak_blocks(100, 101)
    engine.process()
    assert engine.held("a") == 16  # release waits for the next allocation
    engine.schedule()
    assert engine.arena.reservations["a"].released == 1
    assert engine.held("a") == 2 + 1
    assert engine.free == engine.total - 3
    engine.run()
    assert engine.answers["a"] == 30


@BOTH
def test_scatter_holds_as_many_blocks_as_plain_vllm_after_the_prompt(
    folder: Path, cls: AnyScheduler
) -> None:
    engine = Engine(cls, configure(folder, method="scatter"), 60)
    engine.add("a", 20, max_tokens=30)
    engine.schedule()
    assert engine.held("a") == 3 + 3
    for _ in range(10):
        engine.step()
    tokens = engine.scheduler.requests["a"].num_computed_tokens
    assert engine.held("a") == -(-tokens // SIZE)
    engine.run()


@BOTH
@pytest.mark.parametrize("prompt", [1, 7, 8, 15, 16])
def test_short_prompts_are_plain_vllms(folder: Path, cls: AnyScheduler, prompt: int) -> None:
    engine = Engine(cls, configure(folder), 60)
    request = engine.add("a", prompt, max_tokens=20)
    while engine.scheduler.requests:
        engine.schedule()
        if engine.scheduler.requests and request.status == RequestStatus.RUNNING:
            assert engine.held("a") == -(-request.num_computed_tokens // SIZE)
        engine.process()
    assert engine.answers["a"] == 20
    assert engine.arena.private_blocks() == {}


def test_generated_tokens_are_not_hashed(folder: Path) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 60)
    prompt = list(range(20))
    engine.add("a", prompt, max_tokens=40)
    engine.run()
    # Generated tokens have seen the compressed prompt: a follow-up hits its own prompt only.
    engine.add("b", [*prompt, *[1] * 40, *range(30)], max_tokens=1)
    engine.schedule()
    assert engine.chunks["b"] == [(16, 74)]


# --- prefix cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "hit"), [(99, 88), (100, 96), (103, 96), (104, 96), (107, 96)])
def test_a_hit_leaves_the_window_and_takes_all_full_blocks_before_it(
    folder: Path, prompt: int, hit: int
) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 80)
    ids = list(range(prompt))
    engine.add("first", ids, max_tokens=2)
    engine.run()
    engine.add("again", ids, max_tokens=2)
    engine.schedule()
    assert engine.chunks["again"] == [(hit, prompt - hit)]
    assert hit == (prompt - WINDOW) // SIZE * SIZE
    assert engine.held("again") == -(-prompt // SIZE) + 2
    engine.process()
    engine.run()


def test_another_question_hits_the_document_while_its_first_reader_still_runs(
    folder: Path,
) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 80)
    document = list(range(96))
    engine.add("first", [*document, *[500] * 9])
    engine.step()
    engine.step()
    before = engine.arena.private_blocks()["first"]
    free = engine.free
    engine.add("second", [*document, *[600] * 9])
    engine.schedule()
    assert engine.chunks["second"] == [(96, 9)]
    # 14 blocks of prompt, 12 of them cached, and an arena; none of it is the first reader's.
    assert free - engine.free == 14 + 2
    assert engine.arena.private_blocks()["first"] == before
    shared = {b.block_id for b in engine.arena.req_to_blocks["second"]}
    assert not shared & set(before)
    engine.process()
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert engine.free == engine.total


# --- preemption and admission --------------------------------------------------------------------


@BOTH
def test_start_up_reserves_the_peak_of_the_longest_prompt(folder: Path, cls: AnyScheduler) -> None:
    config = configure(folder, max_len=200)
    engine = Engine(cls, config, 80)
    growth = 1 if cls is ArenaAsyncScheduler else 0
    need = engine.planner.peak_blocks(199, 200)
    assert need == 25 + 2 + growth
    assert smallest_pool(config, cls) == need + 1  # vLLM keeps block 0 for itself


LAST = 196
"""Prompt tokens in the last, partly filled block of max_model_len 200."""


@BOTH
@pytest.mark.parametrize("resumed", [False, True])
def test_the_smallest_pool_serves_the_longest_request(
    folder: Path, cls: AnyScheduler, resumed: bool
) -> None:
    config = configure(folder, max_len=200)
    engine = Engine(cls, config, smallest_pool(config, cls))
    engine.add("a", LAST, max_tokens=4)
    if resumed:
        engine.step()
        engine.step()
        engine.preempt("a")
    engine.run(limit=60)
    assert engine.answers["a"] == 4


def test_replay_in_flight_behind_the_compressing_step_has_its_blocks(folder: Path) -> None:
    # Resumed with 40 tokens generated: all are replayed in one step, which asynchronous
    # scheduling plans while the step that compresses the prompt still holds the prompt's blocks.
    config = configure(folder, max_len=200)
    engine = Engine(ArenaAsyncScheduler, config, 60)
    request = engine.add("a", 100, max_tokens=60)
    while request.num_output_tokens < 40:
        engine.step()
    engine.preempt("a")
    while engine.in_flight:
        engine.process()
    peak = engine.planner.peak_blocks(100, request.num_tokens + 1)
    engine.leave_free(peak)
    engine.preemptions = 0
    engine.run(limit=60)
    assert engine.preemptions == 1, "the test's own, reported with the next step"


def test_the_manager_needs_our_scheduler(folder: Path) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 60)
    engine.add("a", 100)
    del engine.arena.reservations  # as vLLM's own scheduler would leave it
    with pytest.raises(RuntimeError, match="only under the scheduler of vllm_kvcompress"):
        engine.schedule()

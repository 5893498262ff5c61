"""What vLLM's own tests ask of its schedulers, asked of ours for requests that are not compressed.

Each scenario runs on both schedulers side by side, and whatever they send, answer and keep is
compared at every step, block for block. ``as_vllm.md`` says which of vLLM's tests is where.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.scheduling import SIZE
from tests.support.side_by_side import EOS, WAYS, Pair

KINDS = [(WAYS[0], False), (WAYS[0], True), (WAYS[2], False)]
EACH_KIND = pytest.mark.parametrize(("way", "asynchronous"), KINDS)


def begun(output: Any) -> list[str]:
    """Names of the requests that a step takes from the queue for the first time."""
    return [request.req_id for request in output.scheduled_new_reqs]


# --- one step after the other --------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("caching", [False, True])
def test_all_that_fits_is_scheduled_in_order(folder: Path, way, asynchronous, caching) -> None:
    pair = Pair(folder, way, asynchronous, enable_prefix_caching=caching)
    for i in range(10):
        pair.add(f"r{i}", 10 + i)
    output = pair.schedule()
    assert begun(output) == [f"r{i}" for i in range(10)]
    assert output.num_scheduled_tokens == {f"r{i}": 10 + i for i in range(10)}
    assert not pair.plain.waiting
    pair.process()
    pair.run()


@EACH_KIND
def test_ended_requests_are_gone_wherever_they_were(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_num_seqs=2)
    for i in range(6):
        pair.add(f"r{i}", 20)
    pair.step()
    for i, name in enumerate(["r4", "r0", "r5", "r1"]):
        pair.finish(
            name, RequestStatus.FINISHED_STOPPED if i % 2 else RequestStatus.FINISHED_ABORTED
        )
        assert pair.plain.get_num_unfinished_requests() == 5 - i
        assert name not in pair.plain.requests
    assert pair.schedule().finished_req_ids == {"r0", "r1", "r4", "r5"}
    pair.run()


@EACH_KIND
def test_chunks_of_several_prompts_share_a_step(folder: Path, way, asynchronous) -> None:
    options = {"max_num_batched_tokens": 128, "long_prefill_token_threshold": 50}
    pair = Pair(folder, way, asynchronous, 200, **options)
    for name in "abc":
        pair.add(name, 100)
    assert pair.schedule().num_scheduled_tokens == {"a": 50, "b": 50, "c": 28}
    pair.process()
    assert pair.schedule().num_scheduled_tokens == {"a": 50, "b": 50, "c": 28}
    pair.process()
    assert pair.schedule().num_scheduled_tokens == {"a": 1, "b": 1, "c": 44}
    pair.run()


@EACH_KIND
def test_a_lone_prompt_ignores_the_threshold_for_long_ones(folder: Path, way, asynchronous) -> None:
    options = {"max_num_batched_tokens": 128, "long_prefill_token_threshold": 50}
    pair = Pair(folder, way, asynchronous, **options)
    pair.add("long", 200)
    assert pair.schedule().num_scheduled_tokens == {"long": 128}
    pair.add("short", 10)
    pair.process()
    assert pair.schedule().num_scheduled_tokens == {"long": 50, "short": 10}
    pair.run()


@EACH_KIND
@pytest.mark.parametrize("chunked", [True, False])
def test_the_queue_keeps_its_order(folder: Path, way, asynchronous, chunked) -> None:
    pair = Pair(
        folder, way, asynchronous, 200,
        max_model_len=120, max_num_batched_tokens=128, enable_chunked_prefill=chunked,
    )  # fmt: skip
    for name, tokens in (("a", 100), ("b", 100), ("c", 5), ("d", 5)):
        pair.add(name, tokens)
    # Without chunks nobody overtakes the one that must wait.
    assert begun(pair.schedule()) == (["a", "b"] if chunked else ["a"])
    pair.run()


@EACH_KIND
def test_no_more_run_than_may(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_num_seqs=3)
    for i in range(7):
        pair.add(f"r{i}", 20, max_tokens=2 + i)
    while pair.plain.has_unfinished_requests():
        pair.step()
        assert len(pair.plain.running) <= 3
    pair.run()


@EACH_KIND
@pytest.mark.parametrize("busy", [True, False])
def test_throttled_prefills_wait_for_running_work_only(folder, way, asynchronous, busy) -> None:
    pair = Pair(folder, way, asynchronous)
    if busy:
        pair.add("run", 8)
        pair.step()
    pair.add("new", 8)
    output = pair.schedule(throttle_prefills=True)
    assert ("new" in begun(output)) is not busy
    assert ("run" in output.num_scheduled_tokens) is busy
    if busy:
        assert begun(pair.schedule()) == ["new"]
    pair.run()


@EACH_KIND
def test_a_throttled_step_leaves_a_prompt_in_chunks_alone(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_num_batched_tokens=50)
    pair.add("runs", 4)
    pair.step()
    pair.add("chunks", 80)
    assert pair.schedule().num_scheduled_tokens["chunks"] > 0
    pair.process()
    assert "chunks" not in pair.schedule(throttle_prefills=True).num_scheduled_tokens
    assert pair.schedule().num_scheduled_tokens["chunks"] > 0
    pair.run()


@EACH_KIND
def test_throttling_backs_off_when_the_queue_does_not_drain(folder, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 60, max_num_batched_tokens=200)
    pair.add("a", 200)
    pair.add("b", 200)
    assert list(pair.schedule().num_scheduled_tokens) == ["a"]
    assert pair.plain.prefill_capacity_bound
    assert "b" in pair.schedule(throttle_prefills=True).num_scheduled_tokens
    pair.run()


# --- answers -------------------------------------------------------------------------------------


@EACH_KIND
def test_answers_end_at_stop_tokens_and_lengths(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_model_len=40)
    sampled = {"eos": [5, EOS], "stop": [5, 42], "deaf": [EOS, 42], "longest": [5]}
    pair.tokens = lambda name, number: (sampled[name] + [7] * 50)[number]
    pair.add("eos", 10, ignore_eos=False)
    pair.add("stop", 10, stop_token_ids=[41, 42])
    pair.add("deaf", 10, max_tokens=3)
    pair.add("longest", 30, max_tokens=100)
    requests = dict(pair.sides[0].requests)
    pair.run()
    ends = {name: (r.status, r.stop_reason) for name, r in requests.items()}
    assert ends == {
        "eos": (RequestStatus.FINISHED_STOPPED, None),
        "stop": (RequestStatus.FINISHED_STOPPED, 42),
        "deaf": (RequestStatus.FINISHED_LENGTH_CAPPED, None),
        "longest": (RequestStatus.FINISHED_LENGTH_CAPPED, None),
    }
    assert [r.num_output_tokens for r in requests.values()] == [2, 2, 3, 10]


@EACH_KIND
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5])
def test_no_token_is_computed_in_vain(folder: Path, way, asynchronous, max_tokens) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("a", 10, max_tokens)
    outputs = [pair.schedule()]
    pair.add("b", 10, max_tokens)
    outputs.append(pair.schedule())
    while pair.sides[0].in_flight:
        pair.process()
        outputs.append(pair.schedule())
    total = sum(output.total_num_scheduled_tokens for output in outputs)
    assert total == 2 * (10 + max_tokens - 1)
    pair.run()


@EACH_KIND
def test_aborts_between_steps_in_flight(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    for i in range(10):
        pair.add(f"r{i}", 10, max_tokens=20)
    requests, order = dict(pair.sides[0].requests), [0, 8, 3, 1, 6, 4, 2, 5, 7, 9]
    pair.schedule()
    for turn, number in enumerate(order):
        pair.finish(f"r{number}")
        pair.process()
        pair.schedule()
        assert requests[f"r{number}"].num_output_tokens == turn
    pair.run()


@EACH_KIND
def test_two_batches_are_in_flight_at_once(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_num_seqs=2)
    pair.add("a", 100)
    assert pair.schedule().num_scheduled_tokens == {"a": 100}
    pair.add("b", 100)
    assert pair.schedule().num_scheduled_tokens["b"] == 100
    pair.process()
    assert pair.schedule().num_scheduled_tokens["a"] == 1
    pair.run()


# --- a full pool ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_request_in_flight_is_preempted_and_keeps_its_token(folder: Path, way: str) -> None:
    # Both prompts fill their blocks to the last slot, and together the pool.
    pair = Pair(folder, way, False, 11, enable_prefix_caching=False)
    pair.add("a", 5 * SIZE)
    assert len(pair.schedule().scheduled_new_reqs[0].block_ids[0]) == 5
    pair.add("b", 5 * SIZE)
    assert begun(pair.schedule()) == ["b"]
    pair.process()
    pair.schedule()
    assert pair.status("b") == RequestStatus.PREEMPTED
    pair.process()
    assert list(pair.sides[0].requests["b"].output_token_ids) == [100]
    pair.run()


@EACH_KIND
@pytest.mark.parametrize("tokens", [2 * SIZE - 2, 2 * SIZE])
def test_the_least_important_is_preempted_and_resumed(folder, way, asynchronous, tokens) -> None:
    pair = Pair(folder, way, asynchronous, 6, scheduling_policy="priority")
    pair.add("low", tokens, 12, priority=5)
    pair.step()
    pair.add("high", 2 * SIZE, 12, priority=0)
    for _ in range(12):
        pair.step()
        if pair.status("low") == RequestStatus.PREEMPTED:
            break
    assert pair.status("low") == RequestStatus.PREEMPTED
    assert [r.request_id for r in pair.plain.running] == ["high"]
    pair.finish("high")
    resumed = pair.schedule()
    assert "low" in {*resumed.scheduled_cached_reqs.resumed_req_ids, *begun(resumed)}
    pair.run()


@EACH_KIND
def test_one_more_block_makes_preemption_needless(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 8, scheduling_policy="priority")
    pair.add("low", 2 * SIZE, 6, priority=5)
    pair.add("high", 2 * SIZE, 6, priority=0)
    pair.run()
    assert not any(r.num_preemptions for r in pair.sides[0].requests.values())


@EACH_KIND
def test_nobody_is_skipped_when_an_earlier_row_is_preempted(folder, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 30, scheduling_policy="priority")
    pair.add("worst", 26 * SIZE - 3, 50, priority=9)
    pair.step()
    pair.add("best", 2 * SIZE - 1, 50, priority=0)
    pair.step()
    pair.add("middle", 1, 50, priority=1)
    for _ in range(20):
        pair.step()
        if pair.status("worst") == RequestStatus.PREEMPTED:
            break
    assert pair.status("middle") == RequestStatus.RUNNING
    pair.run()


@EACH_KIND
def test_a_prompt_that_finds_no_room_leaves_its_hits_alone(folder, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 11)
    common = list(range(3 * SIZE))
    pair.add("one", common, 40)
    pair.step()
    pair.add("two", common + [500 + i for i in range(3 * SIZE)], 1)
    pair.run_until("two")
    pair.add("three", [700] * (2 * SIZE), 40)
    pair.step()
    pair.add("four", common * 3, 1)
    held = pair.blocks("one")
    pair.schedule()
    pool = pair.plain.kv_cache_manager.block_pool
    assert pair.status("four") == RequestStatus.WAITING
    assert {pool.blocks[block].ref_cnt for block in held} == {1}
    pair.run()


# --- priorities ----------------------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize(
    ("priorities", "arrivals", "expected"),
    [
        ([2, 0, 1], [1, 2, 3], "120"),
        ([1, 1, 1], [3, 1, 2], "120"),
        ([2, 1, 1, 0], [1, 3, 2, 4], "3210"),
        ([1, 1, 1, 1], [4, 1, 3, 2], "1320"),
        ([5, 1, 8, 3, 2, 7, 4, 6], list(range(8)), "14360752"),
    ],
)
@pytest.mark.parametrize("rows", [16, 2, 1])
def test_priority_and_then_arrival_decide(
    folder: Path, way, asynchronous, priorities, arrivals, expected, rows
) -> None:
    pair = Pair(folder, way, asynchronous, scheduling_policy="priority", max_num_seqs=rows)
    for i, (priority, arrival) in enumerate(zip(priorities, arrivals, strict=True)):
        pair.add(str(i), 10, 1, priority=priority, arrival=arrival)
    order: list[str] = []
    while pair.plain.waiting:
        waiting = "".join(r.request_id for r in pair.plain.waiting)
        assert waiting == expected[len(order) :]
        order += begun(pair.schedule())
        pair.process()
    assert "".join(order) == expected
    pair.run()


@EACH_KIND
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_random_traffic_in_a_pool_that_preempts(folder, way, asynchronous, policy, seed) -> None:
    random = Random(seed)
    caching = bool(seed % 2)
    options = {"scheduling_policy": policy, "enable_prefix_caching": caching, "max_num_seqs": 8}
    pair = Pair(folder, way, asynchronous, 24, **options)
    for number in range(40):
        prompt = [random.randrange(3)] * random.randrange(1, 60)
        pair.add(str(number), prompt, random.randrange(1, 40), priority=random.randrange(4))
        for _ in range(random.randrange(4)):
            pair.step()
        if not random.randrange(8):
            pair.finish(random.choice(list(pair.sides[0].requests)))
    requests = dict(pair.sides[0].requests)
    pair.run()
    assert any(request.num_preemptions for request in requests.values()), "all had room"


# --- the one difference --------------------------------------------------------------------------


def test_a_prompt_in_chunks_keeps_its_room(folder: Path) -> None:
    # vLLM admits whoever fits now, and preempts the second when the first goes on. Ours reserves
    # what a prompt will need, compressed or not: a prefill that has begun is never refused a block.
    options = {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 24}
    started = []
    for number in (0, 1):
        pair = Pair(folder, WAYS[0], False, 13, **options)
        pair.sides = [pair.sides[number]]
        pair.add("long", 8 * SIZE, 1)
        pair.add("wide", 6 * SIZE, 1)
        started.append(begun(pair.schedule()))
        pair.run()
    assert started == [["long", "wide"], ["long"]]

"""What vLLM's own tests ask of its KV-cache manager and prefix cache, asked of ours.

As in ``test_as_vllm_scheduler.py``; block ids, hashes, the order in which blocks are evicted and
all statistics are compared at every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import RequestStatus

from tests.support.scheduling import SIZE
from tests.support.side_by_side import WAYS, Pair, compression_of, config_of, pool_of
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

KINDS = [(WAYS[0], False), (WAYS[0], True), (WAYS[2], False)]
EACH_KIND = pytest.mark.parametrize(("way", "asynchronous"), KINDS)
DOCUMENT = list(range(100, 100 + 6 * SIZE))


def computed(output: Any, name: str) -> int:
    """Tokens of a request that a step finds in the prefix cache."""
    (found,) = [r.num_computed_tokens for r in output.scheduled_new_reqs if r.req_id == name]
    return int(found)


def cached_blocks(pair: Pair) -> int:
    pool = pair.plain.kv_cache_manager.block_pool
    return sum(block.block_hash is not None for block in pool.blocks)


@EACH_KIND
def test_whole_blocks_of_a_known_prompt_are_hit(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("one", [*DOCUMENT, *[1] * 3], 1)
    assert computed(pair.schedule(), "one") == 0
    assert pair.blocks("one") == [1, 2, 3, 4, 5, 6, 7]
    pair.process()
    pair.add("two", [*DOCUMENT, *[2] * 5], 1)
    output = pair.schedule()
    assert computed(output, "two") == len(DOCUMENT)
    assert output.num_scheduled_tokens["two"] == 5
    assert pair.blocks("two")[:6] == [1, 2, 3, 4, 5, 6]
    pair.process()
    # Of a prompt that is known to its end, one token must still be computed: a block's worth.
    pair.add("three", DOCUMENT, 1)
    assert computed(pair.schedule(), "three") == len(DOCUMENT) - SIZE
    pair.run()


@EACH_KIND
def test_equal_prompts_of_one_step_share_their_blocks(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("one", [*DOCUMENT, *[1] * 3], 3)
    pair.add("two", [*DOCUMENT, *[1] * 3], 3)
    output = pair.schedule()
    assert output.num_scheduled_tokens == {"one": len(DOCUMENT) + 3, "two": 3}
    assert pair.blocks("one")[:6] == pair.blocks("two")[:6]
    for i in range(3):
        pair.add(f"later{i}", [*DOCUMENT, *[1] * 3], 3)
        assert computed(pair.schedule(), f"later{i}") == len(DOCUMENT)
    pair.run()


@EACH_KIND
def test_the_next_turn_hits_what_was_generated(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    for i in range(3):
        pair.add(f"turn{i}", [i] * 30, 50)
    requests = dict(pair.sides[0].requests)
    pair.run()
    for i in range(3):
        text = list(requests[f"turn{i}"].all_token_ids)
        pair.add(f"next{i}", text, 4)
        output = pair.schedule()
        # The last token was never computed.
        assert computed(output, f"next{i}") == (len(text) - 1) // SIZE * SIZE
    pair.run()


@EACH_KIND
def test_decoding_takes_a_block_when_the_last_is_full(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("one", 3 * SIZE - 2, 30)
    pair.schedule()
    while "one" in pair.plain.requests:
        tokens = pair.sides[0].requests["one"].num_computed_tokens
        assert len(pair.blocks("one")) == -(-tokens // SIZE)
        pair.process()
        pair.schedule()
    pair.run()


@EACH_KIND
def test_ends_of_prompts_are_evicted_first(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 11)
    pair.add("one", list(range(5 * SIZE + 7)), 1)
    pair.run_until("one")
    pair.add("two", list(range(200, 200 + 3 * SIZE)), 1)
    pair.run_until("two")
    pool = pair.plain.kv_cache_manager.block_pool
    queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    hashed = [number for number in queue if pool.blocks[number].block_hash is not None]
    # What has no hash comes first; then each prompt from its end to its beginning.
    assert hashed == queue[-len(hashed) :]
    assert hashed[:5] == sorted(hashed[:5], reverse=True)
    pair.add("three", list(range(2 * SIZE + 3)), 1)
    assert computed(pair.schedule(), "three") == 2 * SIZE
    pair.run()


@EACH_KIND
def test_a_reused_block_loses_its_hash(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 7)
    pair.add("one", DOCUMENT[: 5 * SIZE], 1)
    pair.run_until("one")
    assert cached_blocks(pair) == 5
    pair.add("two", [1] * (6 * SIZE - 1), 1)
    pair.schedule()
    assert cached_blocks(pair) == 5  # its own whole blocks
    pair.run()
    pair.add("three", DOCUMENT[: 5 * SIZE], 1)
    assert computed(pair.schedule(), "three") == 0
    pair.run()


@EACH_KIND
def test_hits_are_not_evicted_for_the_rest_of_their_prompt(folder, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 5)
    pair.add("one", [1] * SIZE, 1)
    pair.run_until("one")
    pair.add("two", [2] * SIZE, 1)
    pair.run_until("two")
    # Of four blocks two are known; both are free, and three more are wanted.
    pair.add("three", [1] * SIZE + [3] * (3 * SIZE - 1), 1)
    assert computed(pair.schedule(), "three") == SIZE
    assert pair.free == 0
    pair.run()


@EACH_KIND
def test_without_a_prefix_cache_nothing_is_hit(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, enable_prefix_caching=False)
    for name in ("one", "two"):
        pair.add(name, DOCUMENT, 2)
        assert computed(pair.schedule(), name) == 0
    assert cached_blocks(pair) == 0
    stats = pair.plain.kv_cache_manager.prefix_cache_stats
    assert (stats.requests, stats.queries, stats.hits) == (0, 0, 0)
    pair.run()


@EACH_KIND
def test_a_salt_keeps_prompts_apart(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    expected = {"one": ("a", 0), "same": ("a", 5), "other": ("b", 0), "none": (None, 0)}
    for name, (salt, blocks) in expected.items():
        pair.add(name, DOCUMENT, 1, cache_salt=salt)
        assert computed(pair.schedule(), name) == blocks * SIZE
        pair.process()
    pair.run()


@EACH_KIND
def test_prompt_logprobs_read_nothing_from_the_cache(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("one", DOCUMENT, 1)
    pair.run_until("one")
    pair.add("two", DOCUMENT, 1, prompt_logprobs=5)
    assert computed(pair.schedule(), "two") == 0
    pair.process()
    pair.add("three", [*DOCUMENT, 1], 1)
    assert computed(pair.schedule(), "three") == len(DOCUMENT)
    pair.run()


@EACH_KIND
def test_the_cache_is_emptied_only_when_nobody_uses_it(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    for i in range(4):
        pair.add(f"r{i}", [*DOCUMENT, i], 4)
    pair.schedule()
    assert not pair.reset_prefix_cache()
    assert cached_blocks(pair) > 0
    pair.run()
    assert pair.reset_prefix_cache()
    assert cached_blocks(pair) == 0
    pair.add("again", DOCUMENT, 1)
    assert computed(pair.schedule(), "again") == 0
    pair.run()


@EACH_KIND
def test_running_requests_can_be_sent_back_to_empty_it(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    names = [f"r{i}" for i in range(4)]
    for name in names:
        pair.add(name, DOCUMENT, 6)
    pair.step()
    pair.schedule()
    assert pair.reset_prefix_cache(reset_running_requests=True)
    assert [r.request_id for r in pair.plain.waiting] == names
    assert not pair.plain.running
    assert cached_blocks(pair) == 0
    requests = dict(pair.sides[0].requests)
    pair.run()
    assert {r.num_output_tokens for r in requests.values()} == {6}


@EACH_KIND
def test_a_reset_never_takes_a_row_too_many(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, max_num_seqs=2, scheduling_policy="priority")
    rows: set[str] = set()
    for name, priority in (("a", 5), ("b", 5), ("c", 0), ("d", 1)):
        pair.add(name, DOCUMENT, 6, priority=priority)
    requests = dict(pair.sides[0].requests)
    for turn in range(40):
        if turn in (1, 2, 6):
            pair.reset_prefix_cache(reset_running_requests=True)
        if not pair.plain.has_unfinished_requests():
            break
        output = pair.schedule()
        rows -= output.finished_req_ids | (output.preempted_req_ids or set())
        rows |= set(output.num_scheduled_tokens)
        assert len(rows) <= 2
        if pair.sides[0].in_flight:
            pair.process()
    pair.run()
    assert {request.num_output_tokens for request in requests.values()} == {6}


@EACH_KIND
def test_a_preempted_request_is_looked_up_and_counted_again(folder, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous)
    pair.add("one", [*DOCUMENT, *[1] * 3], 8)
    pair.schedule()
    stats = pair.plain.kv_cache_manager.prefix_cache_stats
    assert (stats.requests, stats.preempted_requests) == (1, 0)
    pair.preempt("one")
    assert pair.status("one") == RequestStatus.PREEMPTED
    pair.schedule()
    pair.process()
    pair.run()


@EACH_KIND
def test_a_hit_that_finds_no_room_is_counted_once(folder: Path, way, asynchronous) -> None:
    pair = Pair(folder, way, asynchronous, 12)
    pair.add("seed", DOCUMENT[: 2 * SIZE], 1)
    pair.run_until("seed")
    pair.add("wide", [1] * (7 * SIZE), 3)
    pair.schedule()
    pair.process()
    pair.add("hits", DOCUMENT, 1)
    before = pair.plain.kv_cache_manager.prefix_cache_stats.requests
    pair.schedule()
    assert pair.status("hits") == RequestStatus.WAITING
    assert pair.plain.kv_cache_manager.prefix_cache_stats.requests == before
    pair.run()


@EACH_KIND
def test_events_tell_what_is_stored_and_removed(folder: Path, way, asynchronous) -> None:
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    pair = Pair(folder, way, asynchronous, 9, kv_events_config=events)
    pool = pair.plain.kv_cache_manager.block_pool
    pair.add("one", DOCUMENT, 1)
    pair.schedule()
    stored = list(pool.kv_event_queue)
    assert [len(event.block_hashes) for event in stored] == [6]
    pair.run()
    pair.add("two", [1] * (7 * SIZE), 1)
    pair.schedule()
    kinds = [type(event).__name__ for event in pool.kv_event_queue]
    assert "BlockRemoved" in kinds
    assert "BlockStored" in kinds
    pair.run()


# --- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("longest", [5 * SIZE - 1, 5 * SIZE + 1])
def test_a_start_asks_for_as_many_blocks(folder: Path, way: str, longest: int) -> None:
    need = -(-longest // SIZE) + 1  # vLLM keeps block 0 for itself
    for compression, kind in ((None, FullAttentionSpec), (compression_of(way), ArenaSpec)):
        config = config_of(folder, compression, max_model_len=longest)
        with pytest.raises(ValueError, match="To serve at least one request"):
            pool_of(config, need - 1, kind)
        assert pool_of(config, need, kind).num_blocks == need

"""What a step of many requests looks at, counted: it must not grow with their square."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.scheduling import BOTH, SIZE, AnyScheduler, Engine, configure
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaScheduler
from vllm_kvcompress.engine.scheduler.release_calendar import ReleaseCalendar
from vllm_kvcompress.engine.scheduler.reservations import Reservation, Reservations

Count = Callable[[], int]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts how often it is read what some request will still be given."""
    seen = [0]

    def read(self: Reservation) -> int:
        seen[0] += 1
        return int(self.__dict__["outstanding"])

    def write(self: Reservation, value: int) -> None:
        self.__dict__["outstanding"] = value

    monkeypatch.setattr(Reservation, "outstanding", property(read, write))
    return lambda: seen[0]


def decoding(folder: Path, cls: AnyScheduler, rows: int, **options: Any) -> Engine:
    """An engine whose requests have all been cut and generate."""
    options = {"check_integrity": False, "reserve_tokens": 100} | options
    engine = Engine(cls, configure(folder, max_num_seqs=2 * rows, **options), 30 * rows)
    for index in range(rows):
        # Each step another row in SIZE needs a block.
        engine.add(f"r{index}", 40 + index % SIZE, max_tokens=100)
    engine.check = lambda: None  # type: ignore[method-assign]
    while any(r.released == 0 for r in engine.arena.reservations.values()) or engine.in_flight:
        engine.step()
        if all(f"r{index}" in engine.arena.reservations for index in range(rows)):
            break
    for _ in range(4):
        engine.step()
    return engine


@BOTH
@pytest.mark.parametrize("rows", [8, 40])
def test_a_decode_step_looks_once_at_each_request_that_gets_a_block(
    folder: Path, cls: AnyScheduler, rows: int, looks: Count
) -> None:
    engine = decoding(folder, cls, rows)
    before, held = looks(), engine.total - engine.free
    for _ in range(SIZE):
        engine.step()
    given = engine.total - engine.free - held
    assert given == rows
    # When its need is asked for and when it is counted anew.
    assert looks() - before <= 3 * given


@pytest.mark.parametrize("rows", [8, 40])
def test_admitting_one_more_looks_at_nobody_with_whom_it_shares_nothing(
    folder: Path, rows: int, looks: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Requests that will be cut in a while: what is shared with them matters until then.
    options = {"budget": 64, "decode_budget": 32, "decode_buffer": 16}
    engine = decoding(folder, ArenaScheduler, rows, **options)
    assert all(r.released == 0 for r in engine.arena.reservations.values())
    counted: list[str] = []
    count = Reservations._count

    def counting(self: Reservations, request_id: str, shared: Any = ()) -> int:
        counted.append(request_id)
        return count(self, request_id, shared)

    monkeypatch.setattr(Reservations, "_count", counting)
    # One that shares the first request's first blocks, and one that shares nothing.
    engine.add("shares", [0, *range(1, 30)], max_tokens=2)
    engine.add("alone", 30, max_tokens=2)
    before, held = looks(), engine.total - engine.free
    engine.schedule()
    given = engine.total - engine.free - held
    assert {"shares", "alone"} <= engine.arena.reservations.keys()
    assert len(counted) <= given + 8
    assert counted.count("r0") >= 1
    assert looks() - before <= 3 * given + 30


@BOTH
def test_a_request_is_asked_for_blocks_to_return_when_it_may_have_some(
    folder: Path, cls: AnyScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    due = ReleaseCalendar.due

    def asking(self: ReleaseCalendar) -> Any:
        for request in due(self):
            asked.append(request.request_id)
            yield request

    monkeypatch.setattr(ReleaseCalendar, "due", asking)
    engine = Engine(cls, configure(folder, reserve_tokens=30), 100)
    engine.add("a", 40, max_tokens=60)
    engine.run()
    # After its cut, and when its reservation is over; a step more while either is in flight.
    assert 2 <= len(asked) <= 2 * engine.depth
    engine.add("b", 100, max_tokens=60)
    for _ in range(10):
        engine.step()
    engine.preempt("b")
    engine.run()
    assert not engine.arena._calendar._days

"""When a request is cut and what it holds in between, against a list of blocks kept token by token.

The naive request below is given a block when a token finds no free slot, takes the blocks of its
survivors at a cut, and throws out what no longer matters when a cut has been processed.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_kvcompress.planning.compression_schedule import CompressionSchedule, Cut, DecodeCuts

SIZE = 4


class Naive:
    """A request's blocks, each known by what it was appended for."""

    def __init__(
        self, schedule: CompressionSchedule, lag: int, prefill_blocks: int | None = None
    ) -> None:
        self.schedule = schedule
        self.lag = lag
        self.prefill_blocks = prefill_blocks
        self.tokens = 0
        self.cuts = 0
        self.released = 0
        self.home = "home 0"
        self.blocks: list[str] = []
        self.gone: list[set[str]] = []  # per cut not yet processed, what it makes releasable
        self.free = 0
        self._due: list[int] = []  # steps to plan until each of them has been processed
        self.started = False

    def next_cut(self) -> Cut | None:
        return self.schedule.cut(self.cuts + 1) if self.schedule.has_cut(self.cuts + 1) else None

    def step(self, tokens: int) -> None:
        """Plan a step of so many tokens, which may end at a cut but not go beyond it."""
        self._due = [steps - 1 for steps in self._due]
        while self._due and self._due[0] < 0:
            self.release()
        if not self.started and self.prefill_blocks is not None:
            self.blocks += ["text 0"] * self.prefill_blocks
        self.started = True
        for _ in range(tokens):
            self.token()
        cut = self.next_cut()
        assert cut is None or self.tokens <= cut.position, "a step must end at its cut"
        if cut is not None and self.tokens == cut.position:
            self.cut(cut)

    def token(self) -> None:
        self.tokens += 1
        if self.prefill_blocks is not None and self.cuts == 0:
            return  # the workspace has room for all of them
        if not self.free:
            self.blocks.append(f"text {self.cuts}")
            self.free = SIZE
        self.free -= 1

    def cut(self, cut: Cut) -> None:
        gone = {f"text {self.cuts}"}
        self.cuts += 1
        if cut.moves:
            gone.add(self.home)
            self.home = f"home {self.cuts}"
            self.blocks += [self.home] * cut.blocks
        self.gone.append(gone)
        self.free = cut.slack
        self._due.append(self.lag)

    def release(self) -> None:
        """Give back what the oldest cut made releasable."""
        gone = self.gone.pop(0)
        self._due.pop(0)
        self.blocks = [block for block in self.blocks if block not in gone]
        self.released += 1


@st.composite
def courses(draw: st.DrawFn) -> CompressionSchedule:
    """Cuts of a prefill, of a generation, or both; those of the planner and wilder ones."""
    cuts: list[Cut] = []
    position = 0
    for _ in range(draw(st.integers(0, 3))):
        position += draw(st.integers(1, 20))
        slack = draw(st.integers(0, SIZE - 1))
        cuts.append(Cut(position, draw(st.integers(1, 5)), slack=slack))
    prompt = position if cuts else draw(st.integers(1, 30))
    repeat = None
    if not cuts or draw(st.booleans()):
        moves = not cuts or draw(st.booleans())
        blocks = draw(st.integers(1, 5)) if moves else cuts[-1].blocks
        first = Cut(prompt + draw(st.integers(1, 20)), blocks, moves=moves)
        repeat = DecodeCuts(first, draw(st.integers(1, 12)))
    return CompressionSchedule(prompt, SIZE, cuts, repeat)


prefill_blocks = st.none() | st.integers(0, 9)
lags = st.integers(0, 2)


@settings(max_examples=200)
@given(courses(), lags, prefill_blocks, st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_blocks_are_those_of_a_request_kept_token_by_token(
    schedule: CompressionSchedule, lag: int, prefill_blocks: int | None, steps: list[int]
) -> None:
    naive = Naive(schedule, lag, prefill_blocks)
    peak = 0
    for tokens in steps:
        cut = naive.next_cut()
        naive.step(min(tokens, cut.position - naive.tokens) if cut else tokens)
        now, released = naive.tokens, naive.released
        assert schedule.count(now) == naive.cuts
        upcoming = naive.next_cut()
        assert schedule.next_position(now) == (upcoming.position if upcoming else None)
        assert schedule.blocks_for(now, released, prefill_blocks) == len(naive.blocks)
        if naive.gone:
            kept = schedule.releasable(released, prefill_blocks)
            doomed = [i for i, block in enumerate(naive.blocks) if block in naive.gone[0]]
            assert list(kept) == doomed
        peak = max(peak, len(naive.blocks))
        assert peak <= schedule.peak_blocks(now, lag, prefill_blocks)


@settings(max_examples=200)
@given(courses(), lags, prefill_blocks, st.integers(1, 150))
def test_the_peak_is_reached_by_steps_from_cut_to_cut(
    schedule: CompressionSchedule, lag: int, prefill_blocks: int | None, tokens: int
) -> None:
    """As a resumed request takes them, whose generated tokens are known already."""
    naive = Naive(schedule, lag, prefill_blocks)
    held = []
    while naive.tokens < tokens:
        cut = naive.next_cut()
        naive.step(min(tokens, cut.position if cut else tokens) - naive.tokens)
        held.append(len(naive.blocks))
    assert max(held) == schedule.peak_blocks(tokens, lag, prefill_blocks)


@settings(max_examples=200)
@given(courses(), lags, prefill_blocks, st.integers(1, 80), st.integers(0, 80))
def test_the_peak_from_now_on_leaves_out_what_is_past(
    schedule: CompressionSchedule, lag: int, prefill_blocks: int | None, tokens: int, more: int
) -> None:
    naive = Naive(schedule, lag, prefill_blocks)
    while naive.tokens < tokens:
        naive.step(1)
    # Only what is still to come counts, so every cut made so far is processed first.
    while naive.gone:
        naive.release()
    start = naive.released
    held = [len(naive.blocks)]
    while naive.tokens < tokens + more:
        naive.step(1)
        held.append(len(naive.blocks))
    peak = schedule.peak_blocks(tokens + more, lag, prefill_blocks, start)
    assert max(held) <= peak <= schedule.peak_blocks(tokens + more, lag, prefill_blocks)


@given(courses(), st.integers(0, 200))
def test_cuts_are_numbered_in_the_order_of_their_positions(
    schedule: CompressionSchedule, tokens: int
) -> None:
    count = schedule.count(tokens)
    positions = [schedule.cut(n).position for n in range(1, count + 1)]
    assert positions == sorted(set(positions))
    assert all(p <= tokens for p in positions)
    assert schedule.first == schedule.cut(1).position
    assert schedule.survivor_blocks(0) == 0
    if schedule.has_cut(count + 1):
        assert schedule.cut(count + 1).position > tokens
        assert schedule.survivor_blocks(count + 1) == schedule.cut(count + 1).blocks


@given(courses(), st.integers(0, 3))
def test_cuts_that_are_not_there_are_refused(schedule: CompressionSchedule, beyond: int) -> None:
    assert not schedule.has_cut(0)
    with pytest.raises(LookupError, match="not 0"):
        schedule.cut(0)
    assume(schedule.decode_cuts is None)
    number = len(schedule.prefill_cuts) + 1 + beyond
    assert not schedule.has_cut(number)
    with pytest.raises(LookupError, match=f"cut {len(schedule.prefill_cuts)} times, not {number}"):
        schedule.cut(number)
    with pytest.raises(ValueError, match="have no end"):
        schedule.tail_blocks(len(schedule.prefill_cuts))


# --- numbers worked out by hand ------------------------------------------------------------------


def test_blocks_at_and_after_the_end_of_the_prompt() -> None:
    # 13 blocks of 8, cut to 4 at the end and never again.
    schedule = CompressionSchedule(100, 8, [Cut(100, 4)])
    assert [schedule.blocks_for(n) for n in (1, 8, 9, 96, 97, 99)] == [1, 1, 2, 12, 13, 13]
    assert schedule.blocks_for(100) == 13 + 4
    assert schedule.blocks_for(101) == 13 + 4 + 1
    assert schedule.blocks_for(100, released=1) == 4
    assert schedule.blocks_for(109, released=1) == 4 + 2
    assert schedule.releasable(0) == range(13)
    # The step after the cut is planned before the cut's own has been processed, or is not.
    assert schedule.peak_blocks(101, lag=1) == 13 + 4 + 1
    assert schedule.peak_blocks(101, lag=0) == 13 + 4
    assert schedule.peak_blocks(101, lag=1, released=1) == 4 + 1
    # A workspace takes the place of the prompt's blocks.
    assert schedule.blocks_for(100, prefill_blocks=3) == 3 + 4
    assert schedule.releasable(0, prefill_blocks=3) == range(3)
    assert schedule.peak_blocks(101, lag=1, prefill_blocks=3) == 3 + 4 + 1


def test_cuts_while_generating_stay_where_they_are_or_move_once() -> None:
    # 20 kept, then a cut back to 20 whenever there are 16 more: nothing moves.
    stay = CompressionSchedule(100, 4, [Cut(100, 5)], DecodeCuts(Cut(116, 5, moves=False), 16))
    assert [stay.cut(n).position for n in range(1, 5)] == [100, 116, 132, 148]
    assert [stay.cut(n).moves for n in range(1, 5)] == [True, False, False, False]
    assert stay.blocks_for(116, released=1) == stay.blocks_for(131, released=2) == 5 + 4
    assert stay.releasable(1) == stay.releasable(2) == range(5, 9)
    assert stay.peak_blocks(10_000, lag=0, released=1) == 5 + 4
    assert stay.peak_blocks(10_000, lag=1, released=1) == 5 + 4 + 4
    # Down from 5 to 3: survivors move to blocks of their own, once.
    move = CompressionSchedule(100, 4, [Cut(100, 5)], DecodeCuts(Cut(116, 3), 16))
    assert [move.cut(n).moves for n in range(1, 5)] == [True, True, False, False]
    assert move.releasable(1) == range(9)
    assert move.releasable(2) == range(3, 7)
    assert move.peak_blocks(10_000, lag=0, released=1) == 5 + 4 + 3

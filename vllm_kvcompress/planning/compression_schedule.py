"""When a request's cache is cut, and how many blocks it holds in between.

A *cut* compresses what the layers hold at that moment. Between cuts a request grows as in plain
vLLM. Blocks are only ever appended to a request's list, in this order:

* *prefill blocks*: those of its first tokens, up to the first cut. In a cascade prefill they are
  blocks from the prefix cache and a workspace, fewer than the prompt would fill;
* for each cut that moves its survivors, the *survivor blocks* that take them;
* after each cut the *tail blocks* of the tokens that follow, up to the next cut.

Once a cut has been processed, the blocks that it made *releasable* leave the list.

Everything follows from the prompt's length and the settings, so scheduler and worker need no
message to agree. All positions are in tokens of the text.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.paging.rounding import cdiv

NEVER = sys.maxsize
"""A number of tokens that no request reaches."""


@dataclass(frozen=True)
class Cut:
    """One compression of one request.

    Attributes:
        position: Tokens of the text that are compressed: the cut happens in the step that computes
            the last of them.
        blocks: R, private blocks afterwards; the layers share their R * L pages.
        moves: Whether survivors go to new blocks; if not, they are packed within their own.
        slack: Free slots in every layer's last page right after the cut.

    """

    position: int
    blocks: int
    moves: bool = True
    slack: int = 0


@dataclass(frozen=True)
class DecodeCuts:
    """Cuts while a request generates: the first one, and one every ``every`` tokens after it."""

    first: Cut
    every: int


class CompressionSchedule:
    """All cuts of one request.

    Args:
        prompt_len: Prompt tokens.
        block_size: Tokens per block.
        prefill_cuts: Cuts of the prefill, ascending; the last one, if any, at the prompt's end.
        decode_cuts: Cuts of the generation, if any.

    """

    def __init__(
        self,
        prompt_len: int,
        block_size: int,
        prefill_cuts: Sequence[Cut],
        decode_cuts: DecodeCuts | None = None,
    ) -> None:
        self.prompt_len = prompt_len
        self.block_size = block_size
        self.prefill_cuts = tuple(prefill_cuts)
        self.decode_cuts = decode_cuts

    @property
    def first(self) -> int:
        """Position of the first cut: tokens before it are plain vLLM's."""
        return self.cut(1).position

    def has_cut(self, number: int) -> bool:
        """Whether there is a cut of that number, counted from 1."""
        return number >= 1 and (self.decode_cuts is not None or number <= len(self.prefill_cuts))

    def cut(self, number: int) -> Cut:
        """Return a cut by its number, counted from 1.

        Raises:
            LookupError: There is no such cut.

        """
        if not self.has_cut(number):
            raise LookupError(f"the request is cut {len(self.prefill_cuts)} times, not {number}")
        if number <= len(self.prefill_cuts):
            return self.prefill_cuts[number - 1]
        assert self.decode_cuts is not None
        later = number - len(self.prefill_cuts) - 1
        if later == 0:
            return self.decode_cuts.first
        first, every = self.decode_cuts.first, self.decode_cuts.every
        return Cut(first.position + later * every, first.blocks, moves=False)

    def kind(self, number: int) -> str:
        """When a cut is made: ``chunk`` (between two), ``prompt`` (at its end) or ``decode``."""
        if number < len(self.prefill_cuts):
            return "chunk"
        return "prompt" if number == len(self.prefill_cuts) else "decode"

    def count(self, num_tokens: int) -> int:
        """Count the cuts at or before a position."""
        done = sum(cut.position <= num_tokens for cut in self.prefill_cuts)
        if self.decode_cuts and num_tokens >= self.decode_cuts.first.position:
            done += 1 + (num_tokens - self.decode_cuts.first.position) // self.decode_cuts.every
        return done

    def next_position(self, num_tokens: int) -> int | None:
        """Position of the first cut beyond num_tokens; None if there is none."""
        number = self.count(num_tokens) + 1
        return self.cut(number).position if self.has_cut(number) else None

    def survivor_blocks(self, number: int) -> int:
        """Count the blocks that hold the survivors after that many cuts."""
        return self.cut(number).blocks if number else 0

    def tail_blocks(
        self, number: int, num_tokens: int | None = None, prefill_blocks: int | None = None
    ) -> int:
        """Count the blocks of the tokens that follow a cut, up to the next one.

        Args:
            number: Number of the cut; 0 for the request's first tokens.
            num_tokens: Tokens computed so far; None: up to the next cut.
            prefill_blocks: In a cascade, blocks in place of those of the first tokens.

        Raises:
            ValueError: num_tokens is None and there is no next cut.

        """
        if number == 0 and prefill_blocks is not None:
            return prefill_blocks
        start = self.cut(number) if number else Cut(0, 0)
        end = num_tokens
        if self.has_cut(number + 1):
            limit = self.cut(number + 1).position
            end = limit if end is None else min(end, limit)
        if end is None:
            raise ValueError("the tokens after the last cut have no end")
        return cdiv(max(end - start.position - start.slack, 0), self.block_size)

    def blocks_for(
        self, num_tokens: int, released: int = 0, prefill_blocks: int | None = None
    ) -> int:
        """Count the blocks that the request must hold to have slots for its first num_tokens.

        Args:
            num_tokens: Prompt and generated tokens.
            released: Cuts whose releasable blocks were given back.
            prefill_blocks: As for :meth:`tail_blocks`.

        """
        count = self.count(num_tokens)
        held = self.survivor_blocks(released)
        for number in range(released, count + 1):
            held += self.tail_blocks(number, num_tokens, prefill_blocks)
            if number < count and self.cut(number + 1).moves:
                held += self.survivor_blocks(number + 1)
        return held

    def unchanged_until(self, num_tokens: int) -> int:
        """Most tokens for which :meth:`blocks_for` surely returns what it does for num_tokens.

        Args:
            num_tokens: Prompt and generated tokens.

        """
        number = self.count(num_tokens)
        start = self.cut(number) if number else Cut(0, 0)
        free_from = start.position + start.slack
        end = free_from + cdiv(max(num_tokens - free_from, 0), self.block_size) * self.block_size
        if self.has_cut(number + 1):
            end = min(end, self.cut(number + 1).position - 1)
        return end

    def releasable(self, released: int, prefill_blocks: int | None = None) -> range:
        """Places in the request's list of the blocks that go once the next cut is processed.

        Args:
            released: Cuts whose releasable blocks were given back.
            prefill_blocks: As for :meth:`tail_blocks`.

        """
        survivors = self.survivor_blocks(released)
        end = survivors + self.tail_blocks(released, None, prefill_blocks)
        return range(0 if self.cut(released + 1).moves else survivors, end)

    def peak_blocks(
        self, num_tokens: int, lag: int, prefill_blocks: int | None = None, released: int = 0
    ) -> int:
        """Peak number of blocks that the request holds from now until it has num_tokens tokens.

        Args:
            num_tokens: Prompt and generated tokens.
            lag: Steps that are planned before a cut's step has been processed.
            prefill_blocks: As for :meth:`tail_blocks`.
            released: Cuts whose releasable blocks were given back.

        """
        count = self.count(num_tokens)
        peak = 0
        # From the second decode cut on, all cuts hold the same number of blocks.
        last = min(count, max(released, len(self.prefill_cuts)) + 1 + lag)
        for number in range(released, last + 1):
            end = num_tokens
            if number < count:
                end = self.cut(number + 1).position
            peak = max(peak, self.blocks_for(end, max(number - lag, released), prefill_blocks))
        return peak

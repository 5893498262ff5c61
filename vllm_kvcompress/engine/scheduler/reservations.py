"""Blocks that are set aside for admitted requests beyond those they hold.

vLLM admits a request if its prompt would fit now, and does not keep the room. Here the peak of what
an admitted request will hold, until it has ``reserved_until`` tokens, is counted against everybody
else's allocations: a number, not blocks.

Each step asks for the sum over all requests once per request that needs a block, so the sum is
kept, and a request is looked at again only when something about it has changed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.paging.arena import IntegrityError
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.compression_schedule import NEVER, CompressionSchedule


@dataclass
class Reservation:
    """What is set aside for one request.

    Attributes:
        schedule: When the request is cut; None if it never is.
        reserved_until: Blocks are reserved for this many tokens and one more; 0: the reservation is
            over.
        prefill_blocks: In a cascade, blocks in place of the prompt's own.
        cached: In a cascade, how many of those come from the prefix cache.
        released: Cuts whose releasable blocks were given back.
        outstanding: Blocks the request will still be given before ``reserved_until`` is processed.
        held: Blocks it held when those were counted.
        peaks: Peak number of blocks it holds until then, by the cuts already released.
        covered: Tokens for which it holds all blocks that it needs.
        next_cut: No cut lies beyond the tokens computed and before this one; 0: look it up.
        next_release: Processed tokens at which blocks go back or the reservation ends; NEVER if
            neither is to come.
        known_tokens: Tokens it had when it was admitted.
        prefilled: Whether those have been processed. Kept up to date in hybrid models only.

    """

    schedule: CompressionSchedule | None
    reserved_until: int
    prefill_blocks: int | None = None
    cached: int = 0
    released: int = 0
    outstanding: int = 0
    held: int = 0
    peaks: dict[int, int] = field(default_factory=dict, repr=False)
    known_tokens: int = 0
    prefilled: bool = False
    covered: int = 0
    next_cut: int = 0
    next_release: int = 0


class WindowGroups(Protocol):
    """Sliding-window groups of a hybrid model, which draw on the same pool."""

    def missing(self, request_id: str, reservation: Reservation) -> int:
        """Count the blocks that a request will still be given in these groups."""

    def block_ids(self) -> set[int]:
        """All blocks that requests hold in these groups."""


class Reservations(dict[str, Reservation]):
    """The reservations of all admitted requests, by request.

    Args:
        planner: Says what requests will hold.
        max_len: Most tokens of any request.
        blocks: By request, the blocks it holds; read only.

    Attributes:
        window_groups: The groups that are not compressed; None if there are none.
        held: Blocks that all requests held when each was last counted.

    """

    window_groups: WindowGroups | None = None

    def __init__(
        self, planner: BlockPlanner, max_len: int, blocks: Mapping[str, Sequence[KVCacheBlock]]
    ) -> None:
        super().__init__()
        self._planner = planner
        self._max_len = max_len
        self._blocks = blocks
        self._outstanding = self.held = 0
        # Of requests whose first cut returns blocks, which are not free if others hold them too:
        # their blocks, and by block who holds it.
        self._returned: dict[str, list[int]] = {}
        self._holders: dict[int, list[str]] = {}

    def quote(
        self,
        request: Request,
        schedule: CompressionSchedule | None,
        prefill_blocks: int | None,
        cached: int = 0,
    ) -> Reservation:
        """Return what would be reserved for a request if it were admitted now.

        Args:
            request: A request that holds no blocks.
            schedule: When it is cut.
            prefill_blocks: In a cascade, blocks in place of its prompt's own.
            cached: In a cascade, how many of those come from the prefix cache.

        """
        until = request.num_tokens
        if schedule is not None:
            # Preempting a compressed request for one block of growth costs its whole prefill.
            left = request.max_tokens - request.num_output_tokens
            until += max(min(left, self._planner.config.reserve_tokens) - 1, 0)
        return Reservation(schedule, until, prefill_blocks, cached, known_tokens=request.num_tokens)

    def blocks_for(self, reservation: Reservation, num_tokens: int) -> int:
        """Count the blocks that a request must hold to have slots for its first num_tokens."""
        if reservation.schedule is None:
            return cdiv(num_tokens, self._planner.block_size)
        return reservation.schedule.blocks_for(
            num_tokens, reservation.released, reservation.prefill_blocks
        )

    def covered(self, reservation: Reservation, num_tokens: int) -> int:
        """Most tokens that need no more blocks than the first num_tokens do, or a number below."""
        if reservation.schedule is None:
            size = self._planner.block_size
            return cdiv(num_tokens, size) * size
        return reservation.schedule.unchanged_until(num_tokens)

    def peak(self, reservation: Reservation, released: int = 0) -> int:
        """Peak number of blocks held between cut ``released`` and the end of the reservation."""
        if released not in reservation.peaks:
            end = min(reservation.reserved_until + 1, self._max_len)
            if reservation.schedule is None:
                # As in plain vLLM, which has no slot for a token before there is one.
                known = reservation.reserved_until
                reservation.peaks[released] = cdiv(known, self._planner.block_size)
            else:
                reservation.peaks[released] = reservation.schedule.peak_blocks(
                    end, self._planner.limits.lag, reservation.prefill_blocks, released
                )
        return reservation.peaks[released]

    def peak_after_first_cut(self, reservation: Reservation) -> int:
        """The same from the first cut's release on; 0 if the request is never cut."""
        return 0 if reservation.schedule is None else self.peak(reservation, 1)

    def __setitem__(self, request_id: str, reservation: Reservation) -> None:
        self.remove(request_id)
        super().__setitem__(request_id, reservation)

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is here. Mutates the reservations."""
        gone = self.pop(request_id, None)
        if gone is not None:
            self._outstanding -= gone.outstanding
            self.held -= gone.held
            self._drop_holder(request_id)

    def next_cut(self, reservation: Reservation, num_tokens: int) -> int:
        """Position of a request's first cut beyond num_tokens; NEVER if there is none.

        Args:
            reservation: An admitted request's; what was found is noted in it.
            num_tokens: Tokens computed, never fewer than when it was last asked for.

        """
        if num_tokens >= reservation.next_cut:
            schedule = reservation.schedule
            position = None if schedule is None else schedule.next_position(num_tokens)
            reservation.next_cut = NEVER if position is None else position
        return reservation.next_cut

    def recount(self, request_id: str) -> None:
        """Count anew what a request holds and will still be given. Mutates its reservation."""
        reservation, blocks = self[request_id], self._blocks[request_id]
        outstanding = self._count(request_id)
        self.held += len(blocks) - reservation.held
        self._outstanding += outstanding - reservation.outstanding
        reservation.held, reservation.outstanding = len(blocks), outstanding
        reservation.next_release = _next_release(reservation)
        if reservation.released or not reservation.reserved_until:
            self._drop_holder(request_id)
        elif self.peak_after_first_cut(reservation):
            known = self._returned.setdefault(request_id, [])
            for block in blocks[len(known) :]:
                known.append(block.block_id)
                self._holders.setdefault(block.block_id, []).append(request_id)

    def recount_sharers(self, request_id: str) -> None:
        """Count anew for those whose blocks a request that was just admitted shares."""
        if self.window_groups is not None:
            others = set(self)  # a window may be shared as well
        else:
            others = self._sharing(b.block_id for b in self._blocks[request_id] if b.ref_cnt == 2)
        for other in others - {request_id}:
            self.recount(other)

    def outstanding(self, but: str | None = None, hits: Sequence[KVCacheBlock] = ()) -> int:
        """Count the blocks that all requests but one will still be given.

        Args:
            but: Id of the request to leave out.
            hits: Blocks of the prefix cache that this request is about to share.

        """
        left_out = None if but is None else self.get(but)
        total = self._outstanding - (0 if left_out is None else left_out.outstanding)
        if self._holders and hits:
            shared = {block.block_id for block in hits if block.ref_cnt == 1}
            total += sum(
                max(self._count(name, shared) - self[name].outstanding, 0)
                for name in self._sharing(shared)
                if name != but
            )
        return total

    def _sharing(self, block_ids: Iterable[int]) -> set[str]:
        """Requests to whom it matters that others hold these blocks."""
        return {name for block_id in block_ids for name in self._holders.get(block_id, ())}

    def _drop_holder(self, request_id: str) -> None:
        for block_id in self._returned.pop(request_id, ()):
            names = self._holders[block_id]
            names.remove(request_id)
            if not names:
                del self._holders[block_id]

    def check_sums(self) -> None:
        """Compare what is kept with what is counted anew.

        Raises:
            IntegrityError: They differ.

        """
        held = sum(len(self._blocks[name]) for name in self)
        outstanding = sum(reservation.outstanding for reservation in self.values())
        if (held, outstanding) != (self.held, self._outstanding):
            raise IntegrityError(
                f"{held} blocks held and {outstanding} reserved, kept as {self.held} and "
                f"{self._outstanding}"
            )
        for name, reservation in self.items():
            # Those that shared blocks with others may have gone; that lowers the others' late.
            late = self.window_groups is not None or name in self._returned
            if not late and reservation.outstanding != self._count(name):
                raise IntegrityError(
                    f"request {name}: {self._count(name)} blocks to come, kept as "
                    f"{reservation.outstanding}"
                )

    def _count(self, request_id: str, shared: Collection[int] = ()) -> int:
        """Blocks a request will need beyond its own, if those in ``shared`` have other owners too.

        Before the first cut, the request holds its prompt's blocks and, at the end, survivors. The
        cut returns the prompt's blocks, and what follows may need more blocks than that: returned
        blocks that nobody else uses can serve, shared ones stay taken and must be made up for.
        """
        reservation, blocks = self[request_id], self._blocks[request_id]
        if not reservation.reserved_until:
            return 0
        peak = self.peak(reservation, reservation.released)
        later = 0 if reservation.released else self.peak_after_first_cut(reservation)
        if later + len(blocks) > peak:
            taken = sum(block.ref_cnt > 1 or block.block_id in shared for block in blocks)
            peak = max(peak, later + taken)
        in_windows = 0
        if self.window_groups is not None:
            in_windows = self.window_groups.missing(request_id, reservation)
        return max(peak - len(blocks), 0) + in_windows


def _next_release(reservation: Reservation) -> int:
    schedule, number = reservation.schedule, reservation.released + 1
    cut = NEVER
    if schedule is not None and schedule.has_cut(number):
        cut = schedule.cut(number).position
    return min(cut, reservation.reserved_until or NEVER)

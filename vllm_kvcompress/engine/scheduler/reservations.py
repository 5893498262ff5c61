"""What requests hold, and what they have been promised beside it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule


@dataclass
class Reservation:
    """One request's part of the pool.

    Attributes:
        course: When it is cut, None if it never is.
        until: Tokens with which it is promised blocks, and for one more; 0: not any longer.
        prefill_blocks: In a cascade, blocks in place of the prompt's own.
        cached: In a cascade, how many of those come from the prefix cache.
        released: Cuts whose superfluous blocks were given back.
        promised: Blocks it will still be given before ``until`` is processed.
        peaks: Most blocks it holds at one time until then, by the cuts behind it.
        known: Tokens it had when it was admitted.
        read: Whether they have been processed. Kept in hybrid models only.

    """

    schedule: CompressionSchedule | None
    reserved_until: int
    prefill_blocks: int | None = None
    cached: int = 0
    released: int = 0
    outstanding: int = 0
    peaks: dict[int, int] = field(default_factory=dict, repr=False)
    known: int = 0
    read: bool = False


class WindowGroups(Protocol):
    """Groups of a hybrid model that draw on the same pool (see ``side.py``)."""

    def missing(self, request_id: str, reservation: Reservation) -> int:
        """Blocks that a request will still be given in these groups."""

    def block_ids(self) -> set[int]:
        """All blocks that requests hold in these groups."""


class Reservations:
    """Everybody's share.

    Args:
        planner: Says what requests will hold.
        max_len: Most tokens of any request.
        blocks: By request, the blocks it holds; read only.

    Attributes:
        side: The groups that are not compressed; None if there are none.

    """

    side: WindowGroups | None = None

    def __init__(
        self, planner: BlockPlanner, max_len: int, blocks: Mapping[str, Sequence[KVCacheBlock]]
    ) -> None:
        self._planner = planner
        self._max_len = max_len
        self._blocks = blocks
        self._reservations: dict[str, Reservation] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._reservations

    def __getitem__(self, request_id: str) -> Reservation:
        return self._reservations[request_id]

    def __iter__(self) -> Iterator[tuple[str, Reservation]]:
        return iter(self._reservations.items())

    def get(self, request_id: str) -> Reservation | None:
        """Return a request's share; None if it holds no blocks."""
        return self._reservations.get(request_id)

    def quote(
        self,
        request: Request,
        schedule: CompressionSchedule | None,
        prefill_blocks: int | None,
        cached: int = 0,
    ) -> Reservation:
        """Return what a request would be promised if it were admitted now.

        Args:
            request: One that holds no blocks.
            course: When it is cut.
            prefill_blocks: In a cascade, blocks in place of its prompt's own.
            cached: In a cascade, how many of those come from the prefix cache.

        """
        reserved_until = request.num_tokens
        if schedule is not None:
            # To throw out a compressed request for a block of growth costs its whole prefill.
            left = request.max_tokens - request.num_output_tokens
            reserved_until += max(min(left, self._planner.config.reserve_tokens) - 1, 0)
        return Reservation(
            schedule, reserved_until, prefill_blocks, cached, known=request.num_tokens
        )

    def admit(self, request_id: str, reservation: Reservation) -> None:
        """Note that a request is about to get its first blocks. Mutates the books."""
        self._reservations[request_id] = reservation

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is here. Mutates the books."""
        self._reservations.pop(request_id, None)

    def blocks_for(self, reservation: Reservation, num_tokens: int) -> int:
        """Blocks that a request must hold to have slots for its first num_tokens tokens."""
        if reservation.schedule is None:
            return cdiv(num_tokens, self._planner.block_size)
        return reservation.schedule.blocks_for(
            num_tokens, reservation.released, reservation.prefill_blocks
        )

    def peak(self, reservation: Reservation, released: int = 0) -> int:
        """Most blocks a request holds from some cut on until all it is promised them for is in."""
        if released not in reservation.peaks:
            end = min(reservation.reserved_until + 1, self._max_len)
            if reservation.schedule is None:
                reservation.peaks[released] = cdiv(end, self._planner.block_size)
            else:
                reservation.peaks[released] = reservation.schedule.peak_blocks(
                    end, self._planner.limits.lag, reservation.prefill_blocks, released
                )
        return reservation.peaks[released]

    def peak_after_first_cut(self, reservation: Reservation) -> int:
        """The same once the first cut's superfluous blocks are gone; 0 if it is never cut."""
        return 0 if reservation.schedule is None else self.peak(reservation, 1)

    def update(self, request_id: str) -> None:
        """Count anew what a request is still missing. Mutates its share."""
        self._reservations[request_id].outstanding = self._missing(request_id)

    def update_all(self) -> None:
        """Count anew for everybody: blocks may be shared by more requests than before."""
        for request_id in self._reservations:
            self.update(request_id)

    def total(self, but: str | None = None, hits: Iterable[KVCacheBlock] = ()) -> int:
        """Blocks promised to all requests but one that do not hold them yet.

        Args:
            but: Its id.
            hits: Blocks of the prefix cache that it is about to share.

        """
        others = [
            (name, reservation) for name, reservation in self._reservations.items() if name != but
        ]
        outstanding = sum(reservation.outstanding for _, reservation in others)
        if shared := {block.block_id for block in hits if block.ref_cnt == 1}:
            outstanding += sum(
                max(self._missing(name, shared) - reservation.outstanding, 0)
                for name, reservation in others
            )
        return outstanding

    def _missing(self, request_id: str, hits: Collection[int] = ()) -> int:
        """Blocks a request will need beyond its own, those of hits being somebody else's too."""
        reservation, blocks = self._reservations[request_id], self._blocks[request_id]
        if not reservation.reserved_until:
            return 0
        peak = self.peak(reservation, reservation.released)
        later = 0 if reservation.released else self.peak_after_first_cut(reservation)
        if later + len(blocks) > peak:
            # What it shares, the first cut takes from it without making it free.
            shared = sum(block.ref_cnt > 1 or block.block_id in hits for block in blocks)
            peak = max(peak, later + shared)
        beside = self.side.missing(request_id, reservation) if self.side is not None else 0
        return max(peak - len(blocks), 0) + beside

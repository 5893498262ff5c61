"""Blocks that are set aside for admitted requests beyond those they hold.

vLLM admits a request if its prompt would fit now, and does not keep the room. Here the peak of what
an admitted request will hold, until it has ``reserved_until`` tokens, is counted against everybody
else's allocations: a number, not blocks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule


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
        peaks: Peak number of blocks it holds until then, by the cuts already released.
        known_tokens: Tokens it had when it was admitted.
        prefilled: Whether those have been processed. Kept up to date in hybrid models only.

    """

    schedule: CompressionSchedule | None
    reserved_until: int
    prefill_blocks: int | None = None
    cached: int = 0
    released: int = 0
    outstanding: int = 0
    peaks: dict[int, int] = field(default_factory=dict, repr=False)
    known_tokens: int = 0
    prefilled: bool = False


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

    """

    window_groups: WindowGroups | None = None

    def __init__(
        self, planner: BlockPlanner, max_len: int, blocks: Mapping[str, Sequence[KVCacheBlock]]
    ) -> None:
        super().__init__()
        self._planner = planner
        self._max_len = max_len
        self._blocks = blocks

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

    def peak(self, reservation: Reservation, released: int = 0) -> int:
        """Peak number of blocks held between cut ``released`` and the end of the reservation."""
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
        """The same from the first cut's release on; 0 if the request is never cut."""
        return 0 if reservation.schedule is None else self.peak(reservation, 1)

    def recount(self, request_id: str) -> None:
        """Count anew what a request will still be given. Mutates its reservation."""
        self[request_id].outstanding = self._outstanding(request_id)

    def recount_all(self) -> None:
        """Count anew for all requests: blocks may be shared by more requests than before."""
        for request_id in self:
            self.recount(request_id)

    def outstanding(self, but: str | None = None, hits: Iterable[KVCacheBlock] = ()) -> int:
        """Count the blocks that all requests but one will still be given.

        Args:
            but: Id of the request to leave out.
            hits: Blocks of the prefix cache that this request is about to share.

        """
        others = [(name, other) for name, other in self.items() if name != but]
        total = sum(other.outstanding for _, other in others)
        if shared := {block.block_id for block in hits if block.ref_cnt == 1}:
            total += sum(
                max(self._outstanding(name, shared) - other.outstanding, 0)
                for name, other in others
            )
        return total

    def _outstanding(self, request_id: str, shared: Collection[int] = ()) -> int:
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

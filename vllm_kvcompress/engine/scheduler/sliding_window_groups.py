"""The groups of a hybrid model that are not compressed: sliding-window layers beside the arena.

They keep plain vLLM's blocks, tables and kernels. Only two things about them concern compression:

* they draw on the same pool, so what a request's groups still need is part of its reservation;
* what they hold of tokens after a cut was computed from a compressed cache, so it must not be
  offered to other requests under the hash of the plain text. What they hold before it is kept in
  the prefix cache where a replay will look for it, which is before the observation window.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.engine.scheduler.arena_manager import ArenaManager
from vllm_kvcompress.engine.scheduler.reservations import Reservation
from vllm_kvcompress.paging.rounding import cdiv

Hits = tuple[Sequence[KVCacheBlock], ...]
"""By group, blocks of the prefix cache; null blocks for tokens out of a window."""


class SlidingWindowGroups:
    """What the sliding-window groups hold, and what each request needs of them.

    A request holds most blocks of a group while its known tokens are prefilled, because all tokens
    of a step need slots; vLLM's own bound for that is ``max_admission_blocks_per_request``. Later
    it holds the window and the tokens in flight.

    Args:
        managers: vLLM's managers of these groups, by group; read only.
        max_len: Most tokens of any request.
        lag: Steps planned before the last one's result is known.

    """

    def __init__(self, managers: dict[int, Any], max_len: int, lag: int) -> None:
        self._managers = managers
        self._max_len = max_len
        self._lag = lag

    def missing(self, request_id: str, reservation: Reservation) -> int:
        """Count the blocks that a request will be given while reserved, less those it returns.

        Args:
            request_id: A request that was admitted.
            reservation: Its reservation.

        """
        total = 0
        for manager in self._managers.values():
            blocks = manager.req_to_blocks.get(request_id, ())
            peak, whole = self._peak(manager, reservation)
            # What it shares will not be free when it slides out of the window.
            own = sum(block.ref_cnt == 1 for block in _tail(blocks))
            total += min(max(whole - len(blocks), 0), max(peak - own, 0))
        return total

    def needed(self, reservation: Reservation, hits: Hits) -> dict[int, int]:
        """By group, count the blocks that a request would take out of the pool while reserved.

        Args:
            reservation: What would be reserved for it.
            hits: Its blocks in the prefix cache, of all groups.

        """
        result = {}
        for group, manager in self._managers.items():
            peak, whole = self._peak(manager, reservation)
            cached = hits[group]
            idle = sum(block.ref_cnt == 0 and not block.is_null for block in cached)
            result[group] = min(peak, max(whole - len(cached), 0) + idle)
        return result

    def lent(self, hits: Hits) -> int:
        """Count the blocks with one owner that a request with these hits would begin to share."""
        return sum(
            block.ref_cnt == 1 and not block.is_null
            for group in self._managers
            for block in hits[group]
        )

    def block_ids(self) -> set[int]:
        """All blocks that requests hold in these groups."""
        return {
            block.block_id
            for manager in self._managers.values()
            for blocks in manager.req_to_blocks.values()
            for block in _tail(blocks)
        }

    def _peak(self, manager: Any, reservation: Reservation) -> tuple[int, int]:
        """Most blocks that one group holds at one time, and all that it is ever given."""
        size = manager.block_size
        end = min(reservation.reserved_until + 1, self._max_len)
        whole = cdiv(end, size)
        seen = cdiv(manager.sliding_window + self._lag, size) + 1
        peak = min(whole, seen)
        if not reservation.prefilled:
            first = min(reservation.known_tokens + 1 + self._lag, self._max_len)
            peak = max(peak, min(cdiv(first, size), manager.max_admission_blocks_per_request))
        return peak, whole


def _tail(blocks: Sequence[KVCacheBlock]) -> Iterable[KVCacheBlock]:
    """Blocks of a request that are still there: those before them are null."""
    for block in reversed(blocks):
        if block.is_null:
            return
        yield block


def patch_coordinator(coordinator: Any, arena: ArenaManager, max_len: int) -> None:
    """Let reservations count window groups, and hash no token after a cut. Mutates the coordinator.

    Args:
        coordinator: vLLM's, of an engine with more groups than the arena's.
        arena: The arena's manager, bound to its scheduler.
        max_len: Most tokens of any request.

    """
    managers = {i: m for i, m in enumerate(coordinator.single_type_managers) if m is not arena}
    reservations = arena.reservations
    side = SlidingWindowGroups(managers, max_len, arena.resolver.default_planner.limits.lag)
    reservations.window_groups = side
    count, allocate = coordinator.get_num_blocks_to_allocate, coordinator.allocate_new_blocks
    remove, cache = coordinator.remove_skipped_blocks, coordinator.cache_blocks

    def get_num_blocks_to_allocate(
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Hits,
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        rest = (total_computed_tokens, num_local_computed_tokens, num_tokens_main_model)
        last = (apply_admission_cap, prefill_end)
        result = int(
            count(request_id, num_tokens, new_computed_blocks, num_encoder_tokens, *rest, *last)
        )
        if request_id in reservations:
            # The arena's manager counts others' reservations only if it needs a block itself.
            if result and not arena.needs_block(request_id, num_tokens):
                result += reservations.outstanding(request_id)
            return result
        for group, blocks in side.needed(arena.quoted(request_id), new_computed_blocks).items():
            now = managers[group].get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks[group], *rest, *last
            )
            result += max(blocks - int(now), 0)
        return result + side.lent(new_computed_blocks)

    def allocate_new_blocks(request_id: str, *args: Any, **kwargs: Any) -> Any:
        begins = request_id not in reservations
        blocks = allocate(request_id, *args, **kwargs)
        if begins:
            reservations.recount_sharers(request_id)
        elif any(blocks):
            reservations.recount(request_id)
        return blocks

    def remove_skipped_blocks(
        request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        remove(request_id, processed_computed_tokens, num_prompt_tokens)
        reservation = reservations.get(request_id)
        if reservation is not None and reservation.reserved_until:
            reservation.prefilled = (
                reservation.prefilled or processed_computed_tokens >= reservation.known_tokens
            )
            reservations.recount(request_id)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        schedule = arena.schedule_of(request.request_id)
        if schedule is None:
            cache(request, num_computed_tokens)
            return
        tokens = min(num_computed_tokens, schedule.first)
        # vLLM keeps only the windows before positions at which a prompt may be taken up again.
        resumed = max(schedule.first - arena.settings_of(request).planner.window, 0)
        for group, manager in enumerate(coordinator.single_type_managers):
            if manager.enable_caching:
                manager.cache_blocks(
                    request,
                    coordinator.get_num_cacheable_tokens(tokens, group),
                    retention_interval=coordinator.retention_interval,
                    replay_boundaries=(resumed, request.num_prompt_tokens - 1),
                )

    # Not by wrap_once: a coordinator belongs to one scheduler, which comes here once.
    for hook in (
        get_num_blocks_to_allocate,
        allocate_new_blocks,
        remove_skipped_blocks,
        cache_blocks,
    ):
        setattr(coordinator, hook.__name__, hook)

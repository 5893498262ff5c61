"""Which blocks a request holds, which are reserved for it, and when it gives blocks back."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.engine.compression_stats import BlockGauges, CompressionCounters
from vllm_kvcompress.engine.scheduler.reservations import Reservation, Reservations
from vllm_kvcompress.paging.arena import IntegrityError
from vllm_kvcompress.planning.compression_schedule import NEVER, CompressionSchedule
from vllm_kvcompress.planning.request_settings import RequestSettings, SettingsResolver

_TERMS = "_kv_compression_terms"

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.kvcompress.manager")


class ArenaManager(FullAttentionManager):
    """Full attention until a request's first cut, then what its schedule says.

    Blocks that a cut makes releasable are given back as soon as the step that made it has been
    processed. A prompt's own are never written after their prefill and keep their hashes, so that
    the prefix cache can go on serving them.

    A request is admitted only if the pool has its peak number of blocks until all of its known
    tokens are computed, and ``reserve_tokens`` generated ones if it is ever cut, beside what is
    reserved for others in the same way. Growth beyond that is as in plain vLLM: a block if one is
    free, else a preemption.

    Attributes:
        resolver: The engine's resolver of request settings; set by :meth:`bind`.
        counters: What has been counted since the scheduler last sent its figures.

    """

    resolver: SettingsResolver

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: Mapping[str, Request] = {}
        self._watermark = 0
        self._reservations: Reservations | None = None
        self._chosen: dict[str, tuple[int, int]] = {}
        self.counters = CompressionCounters()

    def bind(
        self,
        requests: Mapping[str, Request],
        resolver: SettingsResolver,
        max_model_len: int,
        watermark_blocks: int,
    ) -> None:
        """Let the manager see the scheduler's live requests.

        Args:
            requests: The scheduler's own mapping, read only.
            resolver: Says what each request will hold.
            max_model_len: Most tokens of any request.
            watermark_blocks: Blocks that vLLM leaves free when it admits a request.

        """
        self._requests = requests
        self.resolver = resolver
        planner = resolver.default_planner
        self._reservations = Reservations(planner, max_model_len, self.req_to_blocks)
        self._watermark = watermark_blocks

    @property
    def reservations(self) -> Reservations:
        """What is reserved for every request; RuntimeError under a scheduler that is not ours."""
        if self._reservations is None:
            raise RuntimeError("ArenaManager works only under the scheduler of vllm_kvcompress")
        return self._reservations

    def schedule_of(self, request_id: str) -> CompressionSchedule | None:
        """Return when the request is cut, None if it never is."""
        request = self._requests[request_id]
        return self.settings_of(request).schedule(request.num_prompt_tokens)

    def settings_of(self, request: Request) -> RequestSettings:
        """Return the request's method, budget and the like, worked out once."""
        settings: RequestSettings | None = getattr(request, _TERMS, None)
        if settings is None:
            extra = getattr(request.sampling_params, "extra_args", None)
            settings = self.resolver.resolve(extra, request.num_prompt_tokens)
            setattr(request, _TERMS, settings)
        return settings

    def block_gauges(self) -> BlockGauges:
        """Count blocks as they are now."""
        free = self.block_pool.get_num_free_blocks()
        held = self.block_pool.num_gpu_blocks - 1 - free  # less the null block
        requests, size = self._requests, self.block_size
        return BlockGauges(
            held=held,
            reserved=held + self.reservations.outstanding(),
            free=free,
            running_held=self.reservations.held,
            # Of every running request in every step, so without a call each.
            running_plain=sum(
                -(-requests[name].num_computed_tokens // size) for name in self.reservations
            ),
        )

    # --- admission -------------------------------------------------------------------------------

    def usable_hits(self, request: Request, hits: int) -> int:
        """How many leading blocks of the prefix cache leave room for what else a prompt needs.

        A cascade uses them as they are, so in a small pool it may fit without them only.
        """
        prompt_len, total = request.num_prompt_tokens, self.block_pool.num_gpu_blocks - 1
        schedule, planner = self.schedule_of(request.request_id), self.settings_of(request).planner

        def peak(prefill_blocks: int | None) -> int:
            return self.reservations.peak(
                self.reservations.quote(request, schedule, prefill_blocks)
            )

        def is_too_much(count: int) -> bool:
            prefill_blocks = planner.cascade_prefill_blocks(prompt_len, count)
            return prefill_blocks is None or peak(prefill_blocks) > total

        if planner.config.prefill == "full" or planner.streams(prompt_len):
            return hits
        if not planner.can_cascade:
            return hits
        if peak(None) <= total:
            return hits
        return bisect_left(range(1, hits + 1), True, key=is_too_much)

    def choose_prefill(
        self, request: Request, hits: Sequence[KVCacheBlock], computed: int, num_new_tokens: int
    ) -> int:
        """Decide where a request's prompt lies while it is computed. Mutates the choices.

        Args:
            request: One that holds no blocks yet.
            hits: Its blocks in the prefix cache.
            computed: Tokens in them.
            num_new_tokens: Tokens that this step has room for.

        Returns:
            Tokens to schedule; 0 to wait for a step that the whole prompt fits.

        """
        self._chosen.pop(request.request_id, None)
        prompt_len, planner = request.num_prompt_tokens, self.settings_of(request).planner
        mode = planner.config.prefill
        if mode == "full" or planner.streams(prompt_len):
            return num_new_tokens
        prefill_blocks = planner.cascade_prefill_blocks(prompt_len, len(hits))
        if prefill_blocks is None or (
            mode != "cascade" and self._has_room(request, hits, computed)
        ):
            return num_new_tokens
        if num_new_tokens < prompt_len - computed:
            return 0
        self._chosen[request.request_id] = (prefill_blocks, len(hits))
        return num_new_tokens

    def _has_room(self, request: Request, hits: Sequence[KVCacheBlock], computed: int) -> bool:
        """Whether the whole prompt's blocks are free beside all that is reserved."""
        missing = self.get_num_blocks_to_allocate(
            request.request_id, request.num_tokens, hits, computed, computed, request.num_tokens
        )
        return missing + self._watermark <= self.block_pool.get_num_free_blocks()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """See the base class; also counts what is reserved for this request and for others."""
        later = 0
        if (reservation := self.reservations.get(request_id)) is not None:
            if num_tokens <= reservation.covered:
                return 0
            blocks = self.reservations.blocks_for(reservation, num_tokens)
        else:
            reservation = self.quoted(request_id)
            blocks = self.reservations.peak(reservation)
            later = self.reservations.peak_after_first_cut(reservation)
        slots = blocks * self.block_size
        own = super().get_num_blocks_to_allocate(
            request_id,
            slots,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            slots,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        own = max(int(own), later)
        return own + self.reservations.outstanding(request_id, new_computed_blocks) if own else 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; the step that makes a cut gets the blocks for its survivors."""
        reservation = self.reservations.get(request_id)
        if reservation is not None and num_tokens <= reservation.covered:
            return []
        begins = reservation is None
        if reservation is None:
            reservation = self._admit(request_id)
        needed = self.reservations.blocks_for(reservation, num_tokens)
        slots = needed * self.block_size
        blocks = list(super().allocate_new_blocks(request_id, slots, slots))
        reservation.covered = self.reservations.covered(reservation, num_tokens)
        if begins or blocks:
            self.reservations.recount(request_id)
        if begins:
            # Others may share blocks with it from now on, which they will not get free.
            self.reservations.recount_sharers(request_id)
        return blocks

    def needs_block(self, request_id: str, num_tokens: int) -> bool:
        """Whether an admitted request needs another block for its first num_tokens tokens."""
        reservation = self.reservations[request_id]
        if num_tokens <= reservation.covered:
            return False
        needed = self.reservations.blocks_for(reservation, num_tokens)
        return needed > len(self.req_to_blocks[request_id])

    def next_cut(self, request_id: str, num_tokens: int) -> int:
        """Position of an admitted request's first cut beyond num_tokens; NEVER if there is none.

        Args:
            request_id: The request.
            num_tokens: Tokens computed, never fewer than when it was last asked for.

        """
        reservation = self.reservations[request_id]
        if num_tokens >= reservation.next_cut:
            schedule = reservation.schedule
            position = None if schedule is None else schedule.next_position(num_tokens)
            reservation.next_cut = NEVER if position is None else position
        return reservation.next_cut

    def quoted(self, request_id: str) -> Reservation:
        """What would be reserved for a waiting request, with the prefill chosen for it."""
        prefill_blocks, cached = self._chosen.get(request_id, (None, 0))
        schedule = self.schedule_of(request_id)
        return self.reservations.quote(self._requests[request_id], schedule, prefill_blocks, cached)

    def _admit(self, request_id: str) -> Reservation:
        reservation = self.quoted(request_id)
        self._chosen.pop(request_id, None)
        self.reservations[request_id] = reservation
        request = self._requests[request_id]
        planner, prompt_len = self.settings_of(request).planner, request.num_prompt_tokens
        compressed = planner.prompt_cut(prompt_len) is not None
        if not request.num_preemptions:
            counters = self.counters
            requests = counters.compressed_requests if compressed else counters.other_requests
            requests[planner.method.name] += 1
        if not compressed:
            return reservation
        path = "full" if reservation.prefill_blocks is None else "cascade"
        if planner.streams(prompt_len):
            path = "streaming"
        self.counters.prefills[path] += 1
        return reservation

    # --- release ---------------------------------------------------------------------------------

    def may_release(self, running: Sequence[Request]) -> Sequence[Request]:
        """Those of some running requests that may have something to give back."""
        reservations = self.reservations
        if reservations.window_groups is not None:
            return running  # sliding windows do so all the time
        return [
            request
            for request in running
            if request.num_computed_tokens >= reservations[request.request_id].next_release
        ]

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what cuts made releasable, once no step in flight can still read it."""
        reservation = self.reservations.get(request_id)
        if reservation is None or processed_computed_tokens < reservation.next_release:
            return
        released = reservation.released
        while (
            reservation.schedule is not None
            and reservation.schedule.has_cut(reservation.released + 1)
            and reservation.schedule.cut(reservation.released + 1).position
            <= processed_computed_tokens
        ):
            self._release(request_id, reservation.schedule, reservation)
        over = 0 < reservation.reserved_until <= processed_computed_tokens
        if over:
            reservation.reserved_until = 0
        if over or reservation.released > released:
            self.reservations.recount(request_id)

    def _release(
        self, request_id: str, schedule: CompressionSchedule, reservation: Reservation
    ) -> None:
        blocks = self.req_to_blocks[request_id]
        part = schedule.releasable(reservation.released, reservation.prefill_blocks)
        gone = blocks[part.start : part.stop]
        del blocks[part.start : part.stop]
        reservation.released += 1
        self.block_pool.free_blocks(reversed(gone))
        self.counters.blocks_freed += len(gone)
        self.counters.cuts[schedule.kind(reservation.released)] += 1
        if self.resolver.default_planner.config.log_requests:
            facts = {
                "request": request_id,
                "cut": reservation.released,
                "released": len(gone),
                "held": len(blocks),
                "free": self.block_pool.get_num_free_blocks(),
                "total": self.block_pool.num_gpu_blocks - 1,  # less the null block
            }
            logger.info("KVCOMPRESS_POOL %s", json.dumps(facts))

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash what plain vLLM would have computed: tokens before the first cut, not workspace."""
        reservation = self.reservations[request.request_id]
        if reservation.released or reservation.prefill_blocks is not None:
            return
        if reservation.schedule is not None:
            num_tokens = min(num_tokens, reservation.schedule.first)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (finished or preempted) and hand its blocks over."""
        self.reservations.remove(request_id)
        self._chosen.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    # --- verification ----------------------------------------------------------------------------

    def private_blocks(self) -> dict[str, list[int]]:
        """Block ids that no other request may share, of every request that has some."""
        private = {}
        for request_id, reservation in self.reservations.items():
            if reservation.schedule is None:
                continue
            skip = 0
            if not reservation.released:
                skip = (
                    reservation.schedule.tail_blocks(0)
                    if reservation.prefill_blocks is None
                    else reservation.cached
                )
            blocks = self.req_to_blocks[request_id]
            if len(blocks) > skip:
                private[request_id] = [b.block_id for b in blocks[skip:]]
        return private

    def check_integrity(self) -> None:
        """Verify that private blocks are private and the pool's counts add up.

        Raises:
            IntegrityError: They do not.

        """
        owner: dict[int, str] = {}
        by_id = {b.block_id: b for blocks in self.req_to_blocks.values() for b in blocks}
        for request_id, ids in self.private_blocks().items():
            for block_id in ids:
                other = owner.setdefault(block_id, request_id)
                block = by_id[block_id]
                if other != request_id or block.ref_cnt != 1 or block.block_hash is not None:
                    raise IntegrityError(
                        f"block {block_id} of {request_id} is not private: {block}, {other}"
                    )
        # Block frees may be deferred, so blocks can be out of the free queue without an owner.
        groups = self.reservations.window_groups
        in_windows = set() if groups is None else groups.block_ids()
        held, total = len(in_windows.union(by_id)), self.block_pool.num_gpu_blocks - 1
        free = self.block_pool.get_num_free_blocks()
        if held + free > total:
            raise IntegrityError(f"{held} held + {free} free exceed the pool")
        self.reservations.check_sums()
        if held + self.reservations.outstanding() > total:
            raise IntegrityError(
                f"{held} held + {self.reservations.outstanding()} reserved exceed the pool"
            )

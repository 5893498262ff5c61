"""Scheduler-side books: which blocks a request holds, is promised, and gives back when."""

import json
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.arena import IntegrityError
from vllm_kvcompress.course import Course
from vllm_kvcompress.engine.metrics import COUNTERS
from vllm_kvcompress.engine.settings import cuts_while_decoding
from vllm_kvcompress.planner import Planner

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.kvcompress.manager")


@dataclass
class _Admitted:
    """One request that holds blocks.

    Attributes:
        until: Tokens it was admitted with; blocks are promised up to one more.
        front: In a cascade, blocks in place of the prompt's own.
        cached: In a cascade, how many of those come from the prefix cache.
        released: Cuts whose superfluous blocks were given back.
        promised: Blocks it will still be given before ``until`` is processed.

    """

    until: int
    front: int | None = None
    cached: int = 0
    released: int = 0
    promised: int = 0


class ArenaManager(FullAttentionManager):
    """Full attention until a request's first cut; :mod:`vllm_kvcompress.course` says what then.

    Blocks that a cut makes superfluous are given back as soon as the step that made it has been
    processed. A prompt's own are never written after their prefill and go back hash and all, so
    that the prefix cache can go on serving them.

    A request is admitted only if the pool has every block that it will need at one time until all
    of its known tokens are computed, on top of what others were promised in the same way. Growth
    beyond that is as in plain vLLM: there if there is room, by preemption if not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: Mapping[str, Request] = {}
        self._planner: Planner | None = None
        self._max_len = 0
        self._watermark = 0
        self._admitted: dict[str, _Admitted] = {}
        self._chosen: dict[str, tuple[int, int]] = {}
        self.counts = dict.fromkeys(COUNTERS, 0)

    def bind(
        self,
        requests: Mapping[str, Request],
        planner: Planner,
        max_model_len: int,
        watermark_blocks: int,
    ) -> None:
        """Let the manager see the scheduler's live requests.

        Args:
            requests: The scheduler's own mapping, read only.
            planner: Decides what each request will hold.
            max_model_len: Most tokens of any request.
            watermark_blocks: Blocks that vLLM leaves free when it admits a request.

        """
        self._requests = requests
        self._planner = planner
        self._max_len = max_model_len
        self._watermark = watermark_blocks

    @property
    def planner(self) -> Planner:
        """The engine's planner; RuntimeError under a scheduler that is not ours."""
        if self._planner is None:
            raise RuntimeError("ArenaManager works only under the scheduler of vllm_kvcompress")
        return self._planner

    def course_of(self, request_id: str) -> Course | None:
        """Return when the request is cut, None if it never is."""
        request = self._requests[request_id]
        decode = cuts_while_decoding(request.sampling_params)
        return self.planner.course(request.num_prompt_tokens, decode)

    def is_admitted(self, request_id: str) -> bool:
        """Whether the request holds blocks."""
        return request_id in self._admitted

    def is_released(self, request_id: str) -> bool:
        """Whether the request's prompt blocks have been given back."""
        return request_id in self._admitted and self._admitted[request_id].released > 0

    def front_of(self, request_id: str) -> int | None:
        """Blocks in place of the prompt's own if the request's prefill is a cascade."""
        return self._admitted[request_id].front

    def books(self) -> dict[str, int]:
        """Blocks reserved, held and free now, and what has been counted so far."""
        free = self.block_pool.get_num_free_blocks()
        held = self.block_pool.num_gpu_blocks - 1 - free
        return {
            "blocks_held": held,
            "blocks_reserved": held + self._promised(),
            "blocks_free": free,
            **self.counts,
        }

    # --- admission -------------------------------------------------------------------------------

    def usable_hits(self, request: Request, hits: int) -> int:
        """How many leading blocks of the prefix cache leave room for what else a prompt needs.

        A cascade uses them as they are, so in a small pool it may fit without them only.
        """
        prompt_len, total = request.num_prompt_tokens, self.block_pool.num_gpu_blocks - 1

        def is_too_much(count: int) -> bool:
            front = self.planner.front_blocks(prompt_len, count)
            return front is None or self._peak(request.request_id, 0, front) > total

        if self.planner.config.prefill == "full" or self.planner.streams(prompt_len):
            return hits
        if self._peak(request.request_id, 0, None) <= total:
            return hits
        return bisect_left(range(1, hits + 1), True, key=is_too_much)

    def choose_prefill(
        self, request: Request, hits: Sequence[KVCacheBlock], computed: int, num_new_tokens: int
    ) -> int:
        """Decide where a request's prompt shall lie while it is computed. Mutates the books.

        Args:
            request: One that holds no blocks yet.
            hits: Its blocks in the prefix cache.
            computed: Tokens in them.
            num_new_tokens: Tokens that this step has room for.

        Returns:
            Tokens to schedule; 0 to wait for a step that the whole prompt fits.

        """
        self._chosen.pop(request.request_id, None)
        prompt_len, mode = request.num_prompt_tokens, self.planner.config.prefill
        if mode == "full" or self.planner.streams(prompt_len):
            return num_new_tokens
        front = self.planner.front_blocks(prompt_len, len(hits))
        if front is None or (mode != "cascade" and self._has_room(request, hits, computed)):
            return num_new_tokens
        if num_new_tokens < prompt_len - computed:
            return 0
        self._chosen[request.request_id] = (front, len(hits))
        return num_new_tokens

    def _has_room(self, request: Request, hits: Sequence[KVCacheBlock], computed: int) -> bool:
        """Whether the whole prompt's blocks are there beside all that was promised."""
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
        """See the base class; counts what the request was or others were promised, too."""
        later = 0
        if request_id in self._admitted:
            blocks = self._blocks_for(request_id, num_tokens)
        else:
            front = self._chosen.get(request_id, (None, 0))[0]
            blocks = self._peak(request_id, 0, front)
            later = self._peak_after_cut(request_id, front)
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
        return own + self._promised(request_id, new_computed_blocks) if own else 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; the step that makes a cut gets the blocks for its survivors."""
        begins = request_id not in self._admitted
        if begins:
            self._admit(request_id)
        slots = self._blocks_for(request_id, num_tokens) * self.block_size
        blocks = list(super().allocate_new_blocks(request_id, slots, slots))
        # Others may share blocks with it from now on, which they will not get free.
        for name in self._admitted if begins else (request_id,):
            self._update_promise(name)
        return blocks

    def _admit(self, request_id: str) -> None:
        request = self._requests[request_id]
        front, cached = self._chosen.pop(request_id, (None, 0))
        self._admitted[request_id] = _Admitted(request.num_tokens, front, cached)
        if self.planner.plan(request.num_prompt_tokens) is None:
            return
        path = "full" if front is None else "cascade"
        if self.planner.streams(request.num_prompt_tokens):
            path = "streaming"
        self.counts[f"prefills_{path}"] += 1

    def _blocks_for(self, request_id: str, num_tokens: int) -> int:
        course, state = self.course_of(request_id), self._admitted[request_id]
        if course is None:
            return -(-num_tokens // self.block_size)
        return course.blocks_for(num_tokens, state.released, state.front)

    def _peak(self, request_id: str, released: int, front: int | None) -> int:
        """Most blocks the request holds from now on until its known tokens and one more are in."""
        state = self._admitted.get(request_id)
        until = state.until if state else self._requests[request_id].num_tokens
        end = min(until + 1, self._max_len)
        course = self.course_of(request_id)
        if course is None:
            return -(-end // self.block_size)
        return course.peak_blocks(end, self.planner.limits.lag, front, released)

    def _peak_after_cut(self, request_id: str, front: int | None) -> int:
        """The same once the first cut's superfluous blocks are gone; 0 if it is not cut so soon."""
        return 0 if self.course_of(request_id) is None else self._peak(request_id, 1, front)

    def _missing(self, request_id: str, hits: Collection[int] = ()) -> int:
        """Blocks a request will need beyond its own, those of hits being somebody else's too."""
        state, blocks = self._admitted[request_id], self.req_to_blocks[request_id]
        if not state.until:
            return 0
        peak = self._peak(request_id, state.released, state.front)
        later = 0 if state.released else self._peak_after_cut(request_id, state.front)
        if later + len(blocks) > peak:
            # What it shares, the first cut takes from it without making it free.
            shared = sum(block.ref_cnt > 1 or block.block_id in hits for block in blocks)
            peak = max(peak, later + shared)
        return max(peak - len(blocks), 0)

    def _update_promise(self, request_id: str) -> None:
        self._admitted[request_id].promised = self._missing(request_id)

    def _promised(self, but: str | None = None, hits: Iterable[KVCacheBlock] = ()) -> int:
        """Blocks promised to all requests but one that do not hold them yet.

        Args:
            but: Its id.
            hits: Blocks of the prefix cache that it is about to share.

        """
        others = [(name, state) for name, state in self._admitted.items() if name != but]
        promised = sum(state.promised for _, state in others)
        if shared := {block.block_id for block in hits if block.ref_cnt == 1}:
            promised += sum(
                max(self._missing(name, shared) - state.promised, 0) for name, state in others
            )
        return promised

    # --- release ---------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what cuts made superfluous, once no step in flight can still read it."""
        state = self._admitted.get(request_id)
        if state is None:
            return
        if course := self.course_of(request_id):
            while (
                course.has_cut(state.released + 1)
                and course.cut(state.released + 1).position <= processed_computed_tokens
            ):
                self._release(request_id, course, state)
        if processed_computed_tokens >= state.until:
            state.until = 0
        self._update_promise(request_id)

    def _release(self, request_id: str, course: Course, state: _Admitted) -> None:
        blocks = self.req_to_blocks[request_id]
        part = course.superfluous(state.released, state.front)
        gone = blocks[part.start : part.stop]
        del blocks[part.start : part.stop]
        state.released += 1
        self.block_pool.free_blocks(reversed(gone))
        self.counts["blocks_freed"] += len(gone)
        self.counts[f"cuts_{course.kind(state.released)}"] += 1
        if self.planner.config.log_requests:
            facts = {
                "request": request_id,
                "cut": state.released,
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
        course = self.course_of(request.request_id)
        if course is not None:
            state = self._admitted[request.request_id]
            if state.released or state.front is not None:
                return
            num_tokens = min(num_tokens, course.first)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (finished or preempted) and hand its blocks over."""
        self._admitted.pop(request_id, None)
        self._chosen.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    # --- verification ----------------------------------------------------------------------------

    def private_blocks(self) -> dict[str, list[int]]:
        """Block ids that no other request may share, of every request that has some."""
        private = {}
        for request_id, state in self._admitted.items():
            course = self.course_of(request_id)
            if course is None:
                continue
            skip = 0
            if not state.released:
                skip = course.segment(0) if state.front is None else state.cached
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
        held, total = len(by_id), self.block_pool.num_gpu_blocks - 1
        free = self.block_pool.get_num_free_blocks()
        if held + free > total:
            raise IntegrityError(f"{held} held + {free} free exceed the pool")
        if held + self._promised() > total:
            raise IntegrityError(f"{held} held + {self._promised()} promised exceed the pool")

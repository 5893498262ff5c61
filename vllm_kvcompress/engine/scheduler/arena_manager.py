"""Scheduler-side books: which blocks a request holds, is promised, and gives back when."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.engine.metrics import COUNTERS
from vllm_kvcompress.engine.scheduler.reservations import Promises, Share
from vllm_kvcompress.paging.arena import IntegrityError
from vllm_kvcompress.planning.compression_schedule import Course
from vllm_kvcompress.planning.request_settings import Plans, Terms

_TERMS = "_kv_compression_terms"

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.kvcompress.manager")


class ArenaManager(FullAttentionManager):
    """Full attention until a request's first cut, then what its schedule says.

    Blocks that a cut makes superfluous are given back as soon as the step that made it has been
    processed. A prompt's own are never written after their prefill and go back hash and all, so
    that the prefix cache can go on serving them.

    A request is admitted only if the pool has every block that it will need at one time until all
    of its known tokens are computed, and ``reserve_tokens`` generated ones if it is ever cut, on
    top of what others were promised in the same way. Growth beyond that is as in plain vLLM: there
    if there is room, by preemption if not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: Mapping[str, Request] = {}
        self._plans: Plans | None = None
        self._watermark = 0
        self._promises: Promises | None = None
        self._chosen: dict[str, tuple[int, int]] = {}
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))

    def bind(
        self,
        requests: Mapping[str, Request],
        plans: Plans,
        max_model_len: int,
        watermark_blocks: int,
    ) -> None:
        """Let the manager see the scheduler's live requests.

        Args:
            requests: The scheduler's own mapping, read only.
            plans: Say what each request will hold.
            max_model_len: Most tokens of any request.
            watermark_blocks: Blocks that vLLM leaves free when it admits a request.

        """
        self._requests = requests
        self._plans = plans
        self._promises = Promises(plans.own, max_model_len, self.req_to_blocks)
        self._watermark = watermark_blocks

    @property
    def plans(self) -> Plans:
        """The engine's plans; RuntimeError under a scheduler that is not ours."""
        if self._plans is None:
            raise RuntimeError("ArenaManager works only under the scheduler of vllm_kvcompress")
        return self._plans

    @property
    def promises(self) -> Promises:
        """What every request holds and was promised; RuntimeError as for the plans."""
        if self._promises is None:
            raise RuntimeError("ArenaManager works only under the scheduler of vllm_kvcompress")
        return self._promises

    def course_of(self, request_id: str) -> Course | None:
        """Return when the request is cut, None if it never is."""
        request = self._requests[request_id]
        return self.terms_of(request).course(request.num_prompt_tokens)

    def terms_of(self, request: Request) -> Terms:
        """Return the request's method, budget and the like, worked out once."""
        terms: Terms | None = getattr(request, _TERMS, None)
        if terms is None:
            extra = getattr(request.sampling_params, "extra_args", None)
            terms = self.plans.terms(extra, request.num_prompt_tokens)
            setattr(request, _TERMS, terms)
        return terms

    def is_admitted(self, request_id: str) -> bool:
        """Whether the request holds blocks."""
        return request_id in self.promises

    def is_released(self, request_id: str) -> bool:
        """Whether the request's prompt blocks have been given back."""
        share = self.promises.get(request_id)
        return share is not None and share.released > 0

    def front_of(self, request_id: str) -> int | None:
        """Blocks in place of the prompt's own if the request's prefill is a cascade."""
        return self.promises[request_id].front

    def books(self) -> dict[str, int]:
        """Blocks reserved, held and free now, and what has been counted so far."""
        free = self.block_pool.get_num_free_blocks()
        held = self.block_pool.num_gpu_blocks - 1 - free
        return {
            "blocks_held": held,
            "blocks_reserved": held + self.promises.total(),
            "blocks_free": free,
            **self.counts,
        }

    def running(self) -> dict[str, int]:
        """Blocks of requests that hold some: now, and as they would be in plain vLLM."""
        tokens = [self._requests[name].num_computed_tokens for name, _ in self.promises]
        return {
            "running_plain": sum(-(-count // self.block_size) for count in tokens),
            "running_held": sum(len(self.req_to_blocks[name]) for name, _ in self.promises),
        }

    # --- admission -------------------------------------------------------------------------------

    def usable_hits(self, request: Request, hits: int) -> int:
        """How many leading blocks of the prefix cache leave room for what else a prompt needs.

        A cascade uses them as they are, so in a small pool it may fit without them only.
        """
        prompt_len, total = request.num_prompt_tokens, self.block_pool.num_gpu_blocks - 1
        course, planner = self.course_of(request.request_id), self.terms_of(request).planner

        def peak(front: int | None) -> int:
            return self.promises.peak(self.promises.ask(request, course, front))

        def is_too_much(count: int) -> bool:
            front = planner.front_blocks(prompt_len, count)
            return front is None or peak(front) > total

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
        prompt_len, planner = request.num_prompt_tokens, self.terms_of(request).planner
        mode = planner.config.prefill
        if mode == "full" or planner.streams(prompt_len):
            return num_new_tokens
        front = planner.front_blocks(prompt_len, len(hits))
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
        if (share := self.promises.get(request_id)) is not None:
            blocks = self.promises.blocks_for(share, num_tokens)
        else:
            share = self.asked(request_id)
            blocks = self.promises.peak(share)
            later = self.promises.peak_after_cut(share)
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
        return own + self.promises.total(request_id, new_computed_blocks) if own else 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; the step that makes a cut gets the blocks for its survivors."""
        begins = request_id not in self.promises
        if begins:
            self._admit(request_id)
        needed = self.promises.blocks_for(self.promises[request_id], num_tokens)
        slots = needed * self.block_size
        blocks = list(super().allocate_new_blocks(request_id, slots, slots))
        if begins:
            # Others may share blocks with it from now on, which they will not get free.
            self.promises.update_all()
        elif blocks:
            self.promises.update(request_id)
        return blocks

    def wants(self, request_id: str, num_tokens: int) -> bool:
        """Whether an admitted request needs another block for its first num_tokens tokens."""
        needed = self.promises.blocks_for(self.promises[request_id], num_tokens)
        return needed > len(self.req_to_blocks[request_id])

    def asked(self, request_id: str) -> Share:
        """What a waiting request asks for, on the way chosen for its prompt."""
        front, cached = self._chosen.get(request_id, (None, 0))
        course = self.course_of(request_id)
        return self.promises.ask(self._requests[request_id], course, front, cached)

    def _admit(self, request_id: str) -> None:
        share = self.asked(request_id)
        self._chosen.pop(request_id, None)
        self.promises.admit(request_id, share)
        request = self._requests[request_id]
        planner, prompt_len = self.terms_of(request).planner, request.num_prompt_tokens
        compressed = planner.plan(prompt_len) is not None
        if not request.num_preemptions:
            self.counts[f"requests:{planner.method.name}:{str(compressed).lower()}"] += 1
        if not compressed:
            return
        path = "full" if share.front is None else "cascade"
        if planner.streams(prompt_len):
            path = "streaming"
        self.counts[f"prefills_{path}"] += 1

    # --- release ---------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what cuts made superfluous, once no step in flight can still read it."""
        share = self.promises.get(request_id)
        if share is None:
            return
        released = share.released
        while (
            share.course is not None
            and share.course.has_cut(share.released + 1)
            and share.course.cut(share.released + 1).position <= processed_computed_tokens
        ):
            self._release(request_id, share.course, share)
        over = 0 < share.until <= processed_computed_tokens
        if over:
            share.until = 0
        if over or share.released > released:
            self.promises.update(request_id)

    def _release(self, request_id: str, course: Course, share: Share) -> None:
        blocks = self.req_to_blocks[request_id]
        part = course.superfluous(share.released, share.front)
        gone = blocks[part.start : part.stop]
        del blocks[part.start : part.stop]
        share.released += 1
        self.block_pool.free_blocks(reversed(gone))
        self.counts["blocks_freed"] += len(gone)
        self.counts[f"cuts_{course.kind(share.released)}"] += 1
        if self.plans.own.config.log_requests:
            facts = {
                "request": request_id,
                "cut": share.released,
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
            share = self.promises[request.request_id]
            if share.released or share.front is not None:
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
        self.promises.drop(request_id)
        self._chosen.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    # --- verification ----------------------------------------------------------------------------

    def private_blocks(self) -> dict[str, list[int]]:
        """Block ids that no other request may share, of every request that has some."""
        private = {}
        for request_id, share in self.promises:
            if share.course is None:
                continue
            skip = 0
            if not share.released:
                skip = share.course.segment(0) if share.front is None else share.cached
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
        beside = self.promises.side.block_ids() if self.promises.side is not None else set()
        held, total = len(beside.union(by_id)), self.block_pool.num_gpu_blocks - 1
        free = self.block_pool.get_num_free_blocks()
        if held + free > total:
            raise IntegrityError(f"{held} held + {free} free exceed the pool")
        if held + self.promises.total() > total:
            raise IntegrityError(f"{held} held + {self.promises.total()} promised exceed the pool")

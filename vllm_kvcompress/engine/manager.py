"""Scheduler-side books: which blocks a compressed request holds, and when the prompt's go back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.arena import ArenaPlan, IntegrityError
from vllm_kvcompress.config import Planner

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.kvcompress.manager")


class ArenaManager(FullAttentionManager):
    """Full attention until the prompt is done, then R private blocks plus growth.

    One list per request: first the prompt's blocks, then R arena blocks, then growth blocks. The
    prompt's blocks are never written after their own prefill; they leave the front of the list
    as soon as the step that compressed them has been processed, hash and all, and so stay
    available to the prefix cache.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: Mapping[str, Request] = {}
        self._planner: Planner | None = None
        self._released: set[str] = set()

    def bind(self, requests: Mapping[str, Request], planner: Planner) -> None:
        """Let the manager see the scheduler's live requests.

        Args:
            requests: The scheduler's own mapping, read only.
            planner: Decides what each request will hold.

        """
        self._requests = requests
        self._planner = planner

    def plan_of(self, request_id: str) -> ArenaPlan | None:
        """Return what the request will hold after its prefill, None if it stays as it is."""
        if self._planner is None:
            raise RuntimeError("ArenaManager works only under the scheduler of vllm_kvcompress")
        return self._planner.plan(self._requests[request_id].num_prompt_tokens)

    def is_released(self, request_id: str) -> bool:
        """Whether the request's prompt blocks have been given back."""
        return request_id in self._released

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
        """See the base class; counts the blocks of the arena and of growth too."""
        if plan := self.plan_of(request_id):
            if apply_admission_cap and not self.is_released(request_id):
                blocks = plan.peak_blocks(num_tokens)
            else:
                blocks = plan.blocks_for(num_tokens, self.is_released(request_id))
            num_tokens = num_tokens_main_model = blocks * self.block_size
        return int(
            super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
                prefill_end=prefill_end,
            )
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; the step that ends the prefill gets the arena's blocks as well."""
        if plan := self.plan_of(request_id):
            blocks = plan.blocks_for(num_tokens, self.is_released(request_id))
            num_tokens = num_tokens_main_model = blocks * self.block_size
        return list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give the prompt's blocks back once no step in flight can still read them."""
        plan = self.plan_of(request_id)
        if plan is None or self.is_released(request_id):
            return
        if processed_computed_tokens < plan.prompt_len:
            return
        blocks = self.req_to_blocks[request_id]
        prompt = blocks[: plan.prompt_blocks]
        del blocks[: plan.prompt_blocks]
        self._released.add(request_id)
        self.block_pool.free_blocks(reversed(prompt))
        if self._planner is not None and self._planner.config.log_requests:
            pool = self.block_pool
            facts = {
                "request": request_id,
                "released": len(prompt),
                "held": len(blocks),
                "free": pool.get_num_free_blocks(),
                "total": pool.num_gpu_blocks - 1,  # less the null block
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
        """Hash prompt blocks only: generated tokens have seen the compressed prompt."""
        plan = self.plan_of(request.request_id)
        if plan is not None:
            if self.is_released(request.request_id):
                return
            num_tokens = min(num_tokens, plan.prompt_len)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (finished or preempted) and hand its blocks over."""
        self._released.discard(request_id)
        return list(super().pop_blocks_for_free(request_id))

    def private_blocks(self) -> dict[str, list[int]]:
        """Block ids beyond the prompt, of every request that holds its arena."""
        private = {}
        for request_id, blocks in self.req_to_blocks.items():
            plan = self.plan_of(request_id)
            if plan is None:
                continue
            skip = 0 if self.is_released(request_id) else plan.prompt_blocks
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
        held = len(by_id)
        free = self.block_pool.get_num_free_blocks()
        if held + free > self.block_pool.num_gpu_blocks - 1:
            raise IntegrityError(f"{held} held + {free} free exceed the pool")

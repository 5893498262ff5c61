"""vLLM's schedulers with three small changes, each at a method they offer for the purpose.

* the manager sees the requests;
* a prefill step ends at the prompt's end, so that tokens generated before a preemption are
  replayed on the compressed cache, as they were computed the first time;
* a prefix-cache hit leaves the observation window to be computed, so that what is kept does not
  depend on what happened to be cached.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_kvcompress.engine.manager import ArenaManager
from vllm_kvcompress.engine.settings import planner_of


class _ArenaScheduling(Scheduler):
    """The changes, for both schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (self._arena,) = (
            m
            for m in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(m, ArenaManager)
        )
        self._planner = planner_of(self.vllm_config, self._arena.block_size)
        self._arena.bind(self.requests, self._planner)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """See the base class; verifies the books first when asked to."""
        if self._planner.config.check_integrity:
            self._arena.check_integrity()
        return super().schedule(throttle_prefills)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        plan = self._planner.plan(request.num_prompt_tokens)
        if plan is not None:
            most = max(plan.prompt_len - self._planner.window, 0)
            most -= most % plan.block_size
            if hit > most:
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, most)
                hit = most
        return blocks, hit, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        plan = self._planner.plan(request.num_prompt_tokens)
        if plan is not None and num_computed_tokens < plan.prompt_len:
            num_new_tokens = min(num_new_tokens, plan.prompt_len - num_computed_tokens)
        return int(num_new_tokens)


class ArenaScheduler(_ArenaScheduling):
    """For synchronous scheduling."""


class ArenaAsyncScheduler(_ArenaScheduling, AsyncScheduler):
    """For asynchronous scheduling."""

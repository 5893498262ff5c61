"""vLLM's schedulers with a few small changes, each at a method they offer for the purpose.

* the manager sees the requests, and decides where a prompt lies while it is computed;
* a step ends where a cut is due, so that a request that is preempted and replayed is cut where it
  was the first time, and tokens after a cut see what they saw then;
* a request that the engine cannot serve, whatever it carries, ends with an error, and the engine
  lives on;
* a prefix-cache hit leaves the observation window of the first cut to be computed, so that what is
  kept does not depend on what happened to be cached;
* the step's message tells the worker which prompts run as a cascade.
"""

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress.engine.compression_stats import (
    CompressionCounters,
    CompressionStats,
    LayerShares,
    attach_stats,
)
from vllm_kvcompress.engine.judgement import answer_limit, check_form, printable
from vllm_kvcompress.engine.scheduler.arena_manager import ArenaManager
from vllm_kvcompress.engine.scheduler.sliding_window_groups import patch_coordinator
from vllm_kvcompress.engine.settings import resolver_of
from vllm_kvcompress.engine.step.measurement_channel import report_of
from vllm_kvcompress.engine.step.messages import attach
from vllm_kvcompress.eviction.measurements import CutReport

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.kvcompress.scheduler")


class _ArenaScheduling(Scheduler):
    """The changes, for both schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        managers = coordinator.single_type_managers
        (self._arena,) = (m for m in managers if isinstance(m, ArenaManager))
        self._group = managers.index(self._arena)
        self._resolver = resolver_of(self.vllm_config, self._arena.block_size)
        self._arena.bind(
            self.requests,
            self._resolver,
            self.max_model_len,
            self.kv_cache_manager.watermark_blocks,
        )
        if len(managers) > 1:
            patch_coordinator(coordinator, self._arena, self.max_model_len)
        self._hits: tuple[str, Sequence[KVCacheBlock]] = ("", ())
        self._report = CutReport()
        self._layer_shares = LayerShares()

    def add_request(self, request: Request) -> None:
        """See the base class; a request that cannot be served is ended by the step at hand.

        Where requests come in they are judged, too, but not by every front end there is.
        """
        known = request.request_id in self.requests
        super().add_request(request)
        if known:
            return
        try:
            self._judge(request)
        except Exception as error:
            # Of a method or setting that nobody has foreseen; a ValueError says all there is.
            trace = None if isinstance(error, ValueError) else error
            logger.error(
                "Request %s is ended: %s", request.request_id, printable(error), exc_info=trace
            )
            self.grammar_compile_error_reqs.add(request.request_id)

    def _judge(self, request: Request) -> None:
        """Work out all that admission needs to know of a request. Mutates the request."""
        arena, params = self._arena, request.sampling_params
        check_form(params, request.resumable)
        settings, blocks = arena.settings_of(request), arena.block_pool.num_gpu_blocks
        limit = answer_limit(self.vllm_config, settings, params, request.num_prompt_tokens, blocks)
        if limit is not None:
            request.max_tokens = limit
        arena.reservations.peak(arena.quoted(request.request_id))

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM's own set of requests to be ended with an error when a step's output comes in.
        if request.request_id in self.grammar_compile_error_reqs:
            return False
        return bool(super()._handle_blocked_waiting_request(request))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """See the base class; verifies the blocks first when asked to."""
        if self._resolver.default_planner.config.check_integrity:
            self._arena.check_integrity()
        for request in self._arena.may_release(self.running):
            # Else a request could be preempted for want of blocks that another is about to return.
            done = max(request.num_computed_tokens - request.num_in_flight_tokens, 0)
            self.kv_cache_manager.remove_skipped_blocks(request.request_id, done)
        output = super().schedule(throttle_prefills)
        begun = [r.req_id for r in output.scheduled_new_reqs]
        begun += output.scheduled_cached_reqs.resumed_req_ids
        chosen = {name: self._arena.reservations[name].prefill_blocks for name in begun}
        cascades = {name: blocks for name, blocks in chosen.items() if blocks is not None}
        attach(output, cascades)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """See the base class; takes in what the worker measured."""
        self._report = report_of(model_runner_output) or CutReport()
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """See the base class; compression's figures travel along, and counting begins anew."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            arena = self._arena
            counters, report = arena.counters, self._report
            shares = self._layer_shares.add(report)
            attach_stats(stats, CompressionStats(arena.block_gauges(), counters, report, shares))
            arena.counters, self._report = CompressionCounters(), CutReport()
        return stats

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        schedule = self._arena.schedule_of(request.request_id)
        if schedule is not None:
            window = self._arena.settings_of(request).planner.window
            most = max(schedule.first - window, 0)
            most = self._arena.usable_hits(request, min(hit, most) // schedule.block_size)
            most *= schedule.block_size
            if hit > most:
                # Looked up anew: what a sliding window sees before an earlier end may be missing.
                found, hit, behind = self.kv_cache_manager.coordinator.find_longest_cache_hit(
                    request.block_hashes, most
                )
                blocks = self.kv_cache_manager.create_kv_cache_blocks(found)
                boundary = hit + behind if behind else 0
        self._hits = (request.request_id, blocks.blocks[self._group])
        return blocks, hit, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        arena, request_id = self._arena, request.request_id
        reservation = arena.reservations.get(request_id)
        if reservation is not None:
            if num_computed_tokens + num_new_tokens <= reservation.next_cut:
                return int(num_new_tokens)
            cut = arena.reservations.next_cut(reservation, num_computed_tokens)
            return min(int(num_new_tokens), cut - num_computed_tokens)
        schedule = arena.schedule_of(request_id)
        if schedule is None:
            return int(num_new_tokens)
        if (position := schedule.next_position(num_computed_tokens)) is not None:
            num_new_tokens = min(num_new_tokens, position - num_computed_tokens)
        name, hits = self._hits
        return int(
            arena.choose_prefill(
                request, hits if name == request_id else (), num_computed_tokens, num_new_tokens
            )
        )


class ArenaScheduler(_ArenaScheduling):
    """For synchronous scheduling."""


class ArenaAsyncScheduler(_ArenaScheduling, AsyncScheduler):
    """For asynchronous scheduling."""

"""The same requests on vLLM's own scheduler and on ours, compared at every step.

No request here is compressed, so ours has nothing to do that vLLM's does not: both must send the
same messages to the worker, block for block, and give the same answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.scheduling import SIZE, SLIDING
from vllm_kvcompress.engine.checks import BLOCK_STEPS
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaAsyncScheduler, ArenaScheduler
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.planning.request_settings import METHOD_KEY

WAYS = ("large budget", "method none", "request without")
"""How compression can be on and a request not compressed."""

EOS = 999


def compression_of(way: str) -> dict[str, Any]:
    """Settings of a server that leaves the requests of this way alone."""
    settings = {"method": "uniform", "budget": 16, "window": 4, "check_integrity": True}
    if way == "large budget":
        settings["budget"] = 4096
    elif way == "method none":
        settings = {"method": "none", "check_integrity": True}
    return {**settings, "allow": {"method": True}}


def config_of(folder: Path, compression: dict[str, Any] | None, **options: Any) -> VllmConfig:
    """Return a finished configuration, blocks of SIZE tokens; None is plain vLLM."""
    options = {"max_model_len": 400, "max_num_batched_tokens": 1000, **options}
    extra = {} if compression is None else {"kv_compression": compression}
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        block_size=SIZE,
        additional_config=extra,
        **options,
    )
    # No kernel runs here.
    with patch.dict(BLOCK_STEPS, cpu=1):
        return arguments.create_engine_config()


def pool_of(config: VllmConfig, blocks: int, kind: type[FullAttentionSpec]) -> KVCacheConfig:
    """Return what vLLM's start-up makes of memory for so many blocks; two layers have ``kind``."""
    config.cache_config.kv_cache_layout = "LBHNC"
    shape: dict[str, Any] = {"block_size": SIZE, "num_kv_heads": 1, "head_size": 32}
    spec = kind(**shape, dtype=torch.bfloat16)
    beside = SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=SLIDING)
    kinds = getattr(config.model_config.hf_text_config, "layer_types", None) or ["", ""]
    specs: dict[str, KVCacheSpec] = {
        f"layer{i}": beside if name == "sliding_attention" else spec for i, name in enumerate(kinds)
    }
    memory = 2 * blocks * spec.page_size_bytes
    (pool,) = get_kv_cache_configs(config, [specs], [memory])
    return pool


@dataclass
class Side:
    """One of the two schedulers, with its own copies of the requests."""

    scheduler: Any
    extra: dict[str, Any] | None
    requests: dict[str, Request]
    in_flight: deque[SchedulerOutput]


class Pair:
    """Both schedulers. Whatever is done is done to both, and what they do is compared.

    Args:
        folder: Of the model.
        way: One of :data:`WAYS`.
        asynchronous: Take the schedulers that plan a step before the last one's result.
        blocks: In the pool, the null block among them.
        options: vLLM's.

    """

    def __init__(
        self,
        folder: Path,
        way: str,
        asynchronous: bool = False,
        blocks: int = 100,
        **options: Any,
    ) -> None:
        # The memory that start-up asks for is one request's; tests of a full pool want less.
        most = (blocks - 1) * SIZE - 1  # ours asks for a block more at a whole number of blocks
        options["max_model_len"] = min(options.get("max_model_len", 400), most)
        classes = (
            (AsyncScheduler, ArenaAsyncScheduler) if asynchronous else (Scheduler, ArenaScheduler)
        )
        self.depth = 1 + asynchronous
        self.sides = []
        for cls, compression in zip(classes, (None, compression_of(way)), strict=True):
            config = config_of(folder, compression, **options)
            config.scheduler_config.async_scheduling = asynchronous
            pool = pool_of(config, blocks, FullAttentionSpec if compression is None else ArenaSpec)
            config.cache_config.num_gpu_blocks = blocks
            scheduler = cls(
                config, pool, StructuredOutputManager(config), block_size=SIZE, log_stats=True
            )
            extra = {METHOD_KEY: "none"} if compression and way == "request without" else None
            self.sides.append(Side(scheduler, extra, {}, deque()))
        self._hasher = get_request_block_hasher(SIZE, sha256)
        self.sampled: dict[str, int] = {}
        self.tokens: Callable[[str, int], int] = lambda name, number: 100 + number

    def both(self, act: Callable[[Side], Any]) -> Any:
        """Do something to both; what comes back must be equal, and so must their states."""
        results = [act(side) for side in self.sides]
        assert results[-1] == results[0]
        states = [state_of(side.scheduler) for side in self.sides]
        assert states[-1] == states[0]
        return results[0]

    def add(
        self,
        name: str,
        prompt: Sequence[int] | int,
        max_tokens: int = 16,
        *,
        priority: int = 0,
        arrival: float | None = None,
        cache_salt: str | None = None,
        **params: Any,
    ) -> None:
        """Queue a request; a number stands for a prompt that shares no block with another's."""
        number = len(self.sampled)
        ids = [number, *range(1, prompt)] if isinstance(prompt, int) else list(prompt)
        self.sampled[name] = 0

        def act(side: Side) -> None:
            given = {"ignore_eos": True, **params, "max_tokens": max_tokens}
            sampling = SamplingParams(**given, extra_args=side.extra)
            sampling.update_from_generation_config({}, EOS)
            side.requests[name] = Request(
                name,
                list(ids),
                sampling,
                None,
                arrival_time=float(number) if arrival is None else arrival,
                block_hasher=self._hasher,
                priority=priority,
                cache_salt=cache_salt,
            )
            side.scheduler.add_request(side.requests[name])

        self.both(act)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan one step and leave it in flight; returns plain vLLM's message."""

        outputs: list[SchedulerOutput] = []

        def act(side: Side) -> dict[str, Any]:
            output = side.scheduler.schedule(throttle_prefills)
            outputs.append(output)
            if output.num_scheduled_tokens:
                side.in_flight.append(output)
            return message_of(output)

        self.both(act)
        return outputs[0]

    def process(self) -> dict[str, tuple[list[int], str | None]]:
        """Hand back the oldest step; by request, its new tokens and why it ended."""
        output = self.sides[0].in_flight[0]
        names = list(output.num_scheduled_tokens)
        requests = self.sides[0].scheduler.requests
        cached = output.scheduled_cached_reqs
        begin = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        begin |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled: list[list[int]] = []
        for name in names:
            request = requests.get(name)
            done = begin[name] + output.num_scheduled_tokens[name]
            if request is None or done < request.num_tokens:
                sampled.append([])
                continue
            sampled.append([self.tokens(name, self.sampled[name])])
            self.sampled[name] += 1
        index = {name: i for i, name in enumerate(names)}

        def act(side: Side) -> dict[str, tuple[list[int], str | None]]:
            result = ModelRunnerOutput(names, index, sampled_token_ids=[list(s) for s in sampled])
            step = side.in_flight.popleft()
            answers = side.scheduler.update_from_output(step, result)
            return {
                item.request_id: (
                    list(item.new_token_ids),
                    None if item.finish_reason is None else str(item.finish_reason),
                )
                for group in answers.values()
                for item in group.outputs
            }

        found: dict[str, tuple[list[int], str | None]] = self.both(act)
        return found

    def step(self) -> None:
        """One turn of the engine's loop."""
        flying = self.sides[0].in_flight
        while len(flying) < self.depth:
            if not self.schedule().num_scheduled_tokens:
                break
        if flying:
            self.process()

    def run(self, limit: int = 2000) -> None:
        """Go on until nothing is left, with every block back in the pool."""
        while self.plain.has_unfinished_requests() or self.sides[0].in_flight:
            self.step()
            limit -= 1
            assert limit, "a request waits forever"
        assert not self.plain.running
        assert not self.plain.waiting
        assert self.free == self.plain.kv_cache_manager.block_pool.num_gpu_blocks - 1

    def run_until(self, name: str) -> None:
        """Go on until a request has ended."""
        while name in self.plain.requests:
            self.step()

    def finish(self, name: str, status: RequestStatus = RequestStatus.FINISHED_ABORTED) -> None:
        """End a request from outside."""
        self.both(lambda side: len(side.scheduler.finish_requests(name, status)))

    def preempt(self, name: str) -> None:
        """Preempt a running request, as vLLM does for want of blocks."""

        def act(side: Side) -> None:
            request = side.requests[name]
            side.scheduler.running.remove(request)
            side.scheduler._preempt_request(request, 0.0)

        self.both(act)

    def reset_prefix_cache(self, **options: Any) -> bool:
        """Empty the prefix cache; False if blocks are in use."""
        return bool(self.both(lambda side: side.scheduler.reset_prefix_cache(**options)))

    @property
    def plain(self) -> Any:
        """vLLM's own scheduler; what is read of it has been compared with ours."""
        return self.sides[0].scheduler

    @property
    def free(self) -> int:
        return int(self.plain.kv_cache_manager.block_pool.get_num_free_blocks())

    def status(self, name: str) -> RequestStatus:
        return self.sides[0].requests[name].status

    def blocks(self, name: str) -> list[int]:
        """Blocks that a request holds."""
        return list(self.plain.kv_cache_manager.get_block_ids(name)[0])


def message_of(output: SchedulerOutput) -> dict[str, Any]:
    """What the worker reads of a step's message."""
    new = [
        (r.req_id, r.prompt_token_ids, r.block_ids, r.num_computed_tokens, r.prefill_token_ids)
        for r in output.scheduled_new_reqs
    ]
    found = {**vars(output), "scheduled_new_reqs": new}
    found["scheduled_cached_reqs"] = vars(output.scheduled_cached_reqs)
    # Beside the dataclass's own fields there is only what we add.
    return {name: found[name] for name in SchedulerOutput.__dataclass_fields__}


def state_of(scheduler: Scheduler) -> dict[str, Any]:
    """Queues, requests, blocks, the prefix cache in the order of eviction, and statistics."""
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    stats = manager.prefix_cache_stats
    return {
        "running": [r.request_id for r in scheduler.running],
        "waiting": [r.request_id for r in scheduler.waiting],
        "deferred": [r.request_id for r in scheduler.deferred_waiting],
        "counts": scheduler.get_request_counts(),
        "requests": {
            name: (
                str(r.status),
                r.num_computed_tokens,
                list(r.output_token_ids),
                r.num_preemptions,
                r.num_output_placeholders,
                r.num_in_flight_tokens,
                manager.get_block_ids(name),
            )
            for name, r in scheduler.requests.items()
        },
        "free": [b.block_id for b in pool.free_block_queue.get_all_free_blocks()],
        "hashes": [(b.ref_cnt, b.block_hash) for b in pool.blocks],
        "cached": stats and vars(stats).copy(),
        "usage": manager.usage,
        "bound": scheduler.prefill_capacity_bound,
        "events": [repr(event) for event in pool.kv_event_queue],
    }

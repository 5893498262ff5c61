"""Drives vLLM's real schedulers, with ours on top, without a model.

Every step's message is also fed to the worker's ledger, which notes the cuts as the real worker
does, so that the two sides of the engine are compared wherever a step is made.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.engine.checks import BLOCK_STEPS
from vllm_kvcompress.engine.model_layers import layers_of, pool_for_arena
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaAsyncScheduler, ArenaScheduler
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.settings import resolver_of
from vllm_kvcompress.engine.step.block_ledger import BlockLedger
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import DECODE_KEY

SIZE = 8
WINDOW = 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
SLIDING = 20
"""Window of the hybrid model, in tokens: three whole blocks and a bit, wherever it begins."""
GEMMA = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 32,
    "sliding_window": SLIDING,
    "num_hidden_layers": 8,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
}
"""Two full-attention layers, and three groups of two others."""
AnyScheduler = type[ArenaScheduler] | type[ArenaAsyncScheduler]
BOTH = pytest.mark.parametrize("cls", [ArenaScheduler, ArenaAsyncScheduler])


def make_folder(path: Path, layers: int = 2, model: dict[str, Any] | None = None) -> Path:
    """Write a small model's config and make the plugin known."""
    contents = model or LLAMA | {"num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(contents))
    register()
    init_none_hash(sha256)
    return path


def configure(folder: Path, *, max_len: int = 200, **options: Any) -> VllmConfig:
    """A finished configuration with compression on, blocks of SIZE tokens.

    Options of kv_compression go there, all others to vLLM.
    """
    options.setdefault("max_num_batched_tokens", 1000)
    compression = {"method": "uniform", "budget": 16, "window": WINDOW, "prefill": "full"}
    compression |= {"check_integrity": True, "reserve_tokens": 0}
    compression["allow"] = {"method": True, "budget": True, "decode": True}
    for option in fields(KVCompressionConfig):
        if option.name in options:
            compression[option.name] = options.pop(option.name)
    if compression["method"] in ("none", "scatter"):  # they have none
        del compression["window"]
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=max_len,
        block_size=SIZE,
        additional_config={"kv_compression": compression},
        **options,
    )
    # No attention runs, so blocks can be as small as is good to look at.
    with patch.dict(BLOCK_STEPS, cpu=1):
        return arguments.create_engine_config()


def pool_of(config: VllmConfig, blocks: int) -> KVCacheConfig:
    """What vLLM's own start-up makes of memory for that many blocks; ValueError if too few."""
    config.cache_config.kv_cache_layout = "LBHNC"  # as CPU attention has it
    shape: dict[str, Any] = {"block_size": SIZE, "num_kv_heads": 1, "head_size": 32}
    spec = ArenaSpec(**shape, dtype=torch.bfloat16)
    beside = SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=SLIDING)
    count = config.model_config.get_num_layers(config.parallel_config)
    layers = layers_of(config)
    kinds = config.model_config.hf_text_config.layer_types if layers.window_groups else [""] * count
    specs: dict[str, KVCacheSpec] = {
        f"layer{i}": beside if kind == "sliding_attention" else spec for i, kind in enumerate(kinds)
    }
    memory = blocks * spec.page_size_bytes * layers.compressed
    (pool,) = get_kv_cache_configs(config, [specs], [memory])
    return pool


def set_lag(config: VllmConfig, cls: AnyScheduler) -> None:
    """Plan as the scheduler needs it. Mutates config."""
    # The CPU platform turns asynchronous scheduling off; the class works without it.
    config.scheduler_config.async_scheduling = cls is ArenaAsyncScheduler


def smallest_pool(config: VllmConfig, cls: AnyScheduler) -> int:
    """The fewest blocks with which vLLM's own start-up check lets this configuration run."""
    set_lag(config, cls)

    def is_enough(blocks: int) -> bool:
        try:
            pool_of(config, blocks)
        except ValueError:
            return False
        return True

    blocks = 1 + bisect_left(range(1, 500), True, key=is_enough)
    assert is_enough(blocks), "no pool is large enough"
    return blocks


@dataclass(frozen=True)
class InFlight:
    """A step between its planning and the processing of its result.

    Attributes:
        output: The scheduler's message.
        result: The worker's answer.
        using: By request, which admission it is of, and the blocks that the step reads and writes.

    """

    output: SchedulerOutput
    result: ModelRunnerOutput
    using: dict[str, tuple[int, frozenset[int]]]


class Engine:
    """A scheduler, and in place of the workers something that makes up tokens."""

    def __init__(self, cls: AnyScheduler, config: VllmConfig, blocks: int) -> None:
        set_lag(config, cls)
        pool = pool_of(config, blocks)
        assert pool.num_blocks == blocks
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = cls(config, pool, StructuredOutputManager(config), block_size=SIZE)
        self.depth = 2 if cls is ArenaAsyncScheduler else 1
        self.arena = self.scheduler._arena
        self.planner = self.scheduler._resolver.default_planner
        # The worker's own, made from the same configuration.
        self.ledger = BlockLedger(resolver_of(config, SIZE), self.scheduler._group)
        self.config = config
        self.in_flight: deque[InFlight] = deque()
        self.answers: dict[str, int] = {}
        self.admissions: dict[str, int] = {}
        self.preemptions = 0
        self.hits = 0
        self.ballast: list[KVCacheBlock] = []
        # By request, the tokens of each of its steps.
        self.chunks: dict[str, list[tuple[int, int]]] = {}
        self._hasher = get_request_block_hasher(SIZE, sha256)
        self._row = self.scheduler._resolver.row_blocks(config.model_config.max_model_len)
        self._watch_promises()

    def _watch_promises(self) -> None:
        manager = self.scheduler.kv_cache_manager
        original = manager.allocate_slots

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
            blocks = original(request, *args, **kwargs)
            # A request that was admitted must get what it was admitted with. One that is not cut
            # is admitted with room for its known tokens, as in plain vLLM.
            state = self.arena.reservations.get(request.request_id)
            promised = state is not None and state.reserved_until > 0
            if state is not None and promised and state.schedule is None:
                promised = request.num_computed_tokens < state.known_tokens
            assert blocks is not None or not promised, request.request_id
            return blocks

        manager.allocate_slots = allocate_slots

    @property
    def free(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def total(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    @property
    def room(self) -> int:
        """Blocks that the compressed layers of one request can count on."""
        return pool_for_arena(self.config, self.total, SIZE)

    def held(self, name: str) -> int:
        """Blocks in the request's list, all of them taken from the pool."""
        blocks = self.arena.req_to_blocks.get(name, [])
        assert all(block.ref_cnt > 0 for block in blocks)
        return len(blocks)

    def add(
        self,
        name: str,
        prompt: list[int] | int,
        max_tokens: int = 100,
        *,
        decode: bool | None = None,
        priority: int = 0,
    ) -> Request:
        # A number stands for a prompt that shares no block with another request's.
        ids = [len(self.answers), *range(1, prompt)] if isinstance(prompt, int) else prompt
        extra = None if decode is None else {DECODE_KEY: decode}
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        # A clock would let equal priorities tie.
        time = float(len(self.answers))
        request = Request(
            name,
            ids,
            params,
            None,
            arrival_time=time,
            block_hasher=self._hasher,
            priority=priority,
        )
        self.answers[name] = 0
        self.chunks[name] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.check()

    def preempt(self, name: str) -> None:
        """Preempt a running request, as vLLM does for want of blocks."""
        request = self.scheduler.requests[name]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)
        self.check()

    def throw_out(self, name: str) -> int:
        """Preempt a request, let steps in flight end and return its tokens; chunks begin anew."""
        self.preempt(name)
        while self.in_flight:
            self.process()
        self.chunks[name].clear()
        return int(self.scheduler.requests[name].num_tokens)

    def schedule(self) -> SchedulerOutput:
        """Plan one step and leave it in flight; both sides must agree on every block."""
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        self.preemptions += len(output.preempted_req_ids or ())
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        begun = [*computed, *cached.resumed_req_ids]
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name in begun:
            self.admissions[name] = self.admissions.get(name, 0) + 1
            self.hits += computed[name] > 0
        for name, count in output.num_scheduled_tokens.items():
            self.chunks[name].append((computed[name], count))
        # The model samples for a row once all its known tokens are in.
        requests = self.scheduler.requests
        sampled = [[] if requests[name].is_prefill_chunk else [1] for name in names]
        index = {name: i for i, name in enumerate(names)}
        self.ledger.update(output)
        self.check()
        if names:
            result = ModelRunnerOutput(names, index, sampled_token_ids=sampled)
            using = {name: (self.admissions[name], self.used(name)) for name in names}
            self.in_flight.append(InFlight(output, result, using))
        for name in names:
            entry = self.ledger[name]
            if entry.ends_at_cut:
                entry.advance()
                self._compare(name, entry)
        return output

    def used(self, name: str) -> frozenset[int]:
        """Blocks that the worker reads and writes in the request's current step."""
        entry = self.ledger[name]
        return frozenset(entry.private_blocks() if entry.cuts_made else entry.blocks)

    def check(self) -> None:
        """Verify both sides, and that the worker's blocks are those that the scheduler holds."""
        self.arena.check_integrity()
        assert self.free + self.taken() == self.total
        for name, entry in self.ledger:
            if name in self.arena.reservations:
                self._compare(name, entry)
        for step in self.in_flight:
            for name, (admission, using) in step.using.items():
                # Steps of requests that were preempted run before anybody else's use of the block.
                if name in self.arena.reservations and self.admissions[name] == admission:
                    held = {block.block_id for block in self.arena.req_to_blocks[name]}
                    assert using <= held, f"{name} lost blocks that a step in flight uses"

    def _compare(self, name: str, entry: WorkerRequest) -> None:
        state = self.arena.reservations[name]
        assert entry.prefill_blocks == state.prefill_blocks
        if entry.prefill_blocks is not None and not entry.cuts_made:
            assert entry.computed // self.arena.block_size == state.cached
        assert len(entry.blocks) <= self._row
        blocks = [block.block_id for block in self.arena.req_to_blocks[name]]
        assert state.released <= entry.cuts_made
        for number in range(state.released, entry.cuts_made):
            # What goes back once the scheduler has processed the cut.
            assert entry.schedule is not None
            part = entry.schedule.releasable(number, entry.prefill_blocks)
            del blocks[part.start : part.stop]
        assert blocks == (entry.private_blocks() if entry.cuts_made else entry.blocks), name

    def leave_free(self, blocks: int) -> None:
        """Take blocks out of the pool, so that it is as small as a test wants it."""
        pool = self.scheduler.kv_cache_manager.block_pool
        self.ballast = pool.get_new_blocks(self.free - blocks)

    def taken(self) -> int:
        """Blocks in use: shared ones count once."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        lists = [blocks for manager in managers for blocks in manager.req_to_blocks.values()]
        held = [b.block_id for blocks in (*lists, self.ballast) for b in blocks if not b.is_null]
        return len(set(held))

    def process(self) -> None:
        """Hand the oldest step's tokens to the scheduler."""
        step = self.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(step.output, step.result).values():
            for item in outputs.outputs:
                self.answers[item.request_id] += len(item.new_token_ids)
        self.check()

    def step(self) -> None:
        """One turn of the engine's loop: keep the pipeline full, then take the oldest result."""
        while len(self.in_flight) < self.depth:
            if not self.schedule().num_scheduled_tokens:
                break
        if self.in_flight:
            self.process()

    def run(self, limit: int = 3000) -> None:
        """Go on until nothing is left; fail if some request waits forever."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests() and not self.in_flight:
                break
            self.step()
        assert not self.scheduler.requests, "a request waits forever"
        assert self.free == self.total - len(self.ballast), "blocks were lost"

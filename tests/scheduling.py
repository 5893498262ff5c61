"""Drives vLLM's real schedulers, with ours on top, without a model.

Every step's message is also fed to the worker's ledger, so that the two sides of the engine are
compared wherever a step is made.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

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
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.engine.ledger import Ledger
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.scheduler import ArenaAsyncScheduler, ArenaScheduler
from vllm_kvcompress.engine.spec import ArenaSpec

SIZE = 8
WINDOW = 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
AnyScheduler = type[ArenaScheduler] | type[ArenaAsyncScheduler]


def make_folder(path: Path) -> Path:
    """Write a small model's config and make the plugin known."""
    (path / "config.json").write_text(json.dumps(LLAMA))
    register()
    init_none_hash(sha256)
    return path


def configure(folder: Path, *, budget: Any = 16, max_len: int = 200, **options: Any) -> VllmConfig:
    """A finished configuration with compression on, blocks of SIZE tokens."""
    options.setdefault("max_num_batched_tokens", 1000)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=max_len,
        block_size=SIZE,
        additional_config={
            "kv_compression": {
                "method": options.pop("method", "uniform"),
                "budget": budget,
                "window": WINDOW,
                "check_integrity": True,
            }
        },
        **options,
    ).create_engine_config()


def pool_of(config: VllmConfig, blocks: int) -> KVCacheConfig:
    """What vLLM's own start-up makes of memory for that many blocks; ValueError if too few."""
    config.cache_config.kv_cache_layout = "LBHNC"  # as CPU attention has it
    spec = ArenaSpec(block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    specs = {f"layer{i}": spec for i in range(2)}
    memory = blocks * spec.page_size_bytes * len(specs)
    (pool,) = get_kv_cache_configs(config, [specs], [memory])
    return pool


class Engine:
    """A scheduler, and in place of the workers something that makes up tokens."""

    def __init__(self, cls: AnyScheduler, config: VllmConfig, blocks: int) -> None:
        # The CPU platform turns asynchronous scheduling off; the class works without it.
        config.scheduler_config.async_scheduling = cls is ArenaAsyncScheduler
        pool = pool_of(config, blocks)
        assert pool.num_blocks == blocks
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = cls(config, pool, StructuredOutputManager(config), block_size=SIZE)
        self.depth = 2 if cls is ArenaAsyncScheduler else 1
        self.arena = self.scheduler._arena
        self.planner = self.scheduler._planner
        self.ledger = Ledger(self.planner)
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.answers: dict[str, int] = {}
        self.preemptions = 0
        self.ballast: list[KVCacheBlock] = []
        # By request, the tokens of each of its steps.
        self.chunks: dict[str, list[tuple[int, int]]] = {}
        self._hasher = get_request_block_hasher(SIZE, sha256)

    @property
    def free(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def total(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def held(self, name: str) -> int:
        """Blocks in the request's list, all of them taken from the pool."""
        blocks = self.arena.req_to_blocks.get(name, [])
        assert all(block.ref_cnt > 0 for block in blocks)
        return len(blocks)

    def add(self, name: str, prompt: list[int] | int, max_tokens: int = 100) -> Request:
        # A number stands for a prompt that shares no block with another request's.
        ids = [len(self.answers), *range(1, prompt)] if isinstance(prompt, int) else prompt
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(name, ids, params, None, block_hasher=self._hasher)
        self.answers[name] = 0
        self.chunks[name] = []
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> SchedulerOutput:
        """Plan one step and leave it in flight; both sides must agree on every block."""
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        self.preemptions += len(output.preempted_req_ids or ())
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, count in output.num_scheduled_tokens.items():
            self.chunks[name].append((computed[name], count))
        # The model samples for a row once all its known tokens are in.
        requests = self.scheduler.requests
        sampled = [[] if requests[name].is_prefill_chunk else [1] for name in names]
        index = {name: i for i, name in enumerate(names)}
        if names:
            result = ModelRunnerOutput(names, index, sampled_token_ids=sampled)
            self.in_flight.append((output, result))
        self.ledger.update(output)
        private = self.arena.private_blocks()
        for name in names:
            assert self.ledger[name].private_blocks() == private.get(name, []), name
        self.arena.check_integrity()
        assert self.free + self.taken() == self.total
        return output

    def leave_free(self, blocks: int) -> None:
        """Take blocks out of the pool, so that it is as small as a test wants it."""
        pool = self.scheduler.kv_cache_manager.block_pool
        self.ballast = pool.get_new_blocks(self.free - blocks)

    def taken(self) -> int:
        """Blocks in use: shared ones count once."""
        lists = self.arena.req_to_blocks.values()
        held = [block.block_id for blocks in (*lists, self.ballast) for block in blocks]
        return len(set(held))

    def process(self) -> None:
        """Hand the oldest step's tokens to the scheduler."""
        output, result = self.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for item in outputs.outputs:
                self.answers[item.request_id] += len(item.new_token_ids)
        self.arena.check_integrity()

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

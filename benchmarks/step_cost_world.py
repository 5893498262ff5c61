"""The host's share of a step in one checkout: vLLM's real schedulers and our session, no model.

Run by ``bench_step_cost`` in a process whose PYTHONPATH says which checkout is measured. It reads
lines of JSON and answers each with one: ``{"rows": N}`` makes N running requests, compressed and
decoding; ``{}`` runs a turn and answers microseconds a step by part.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.jit import JITFunction
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.engine.checks import BLOCK_STEPS
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaScheduler
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.settings import resolver_of
from vllm_kvcompress.engine.step.session import Session
from vllm_kvcompress.paging.arena import PageGeometry, deal_pages
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.strided_codec import StridedPageCodec

LAYERS, SIZE, PROMPT, BUDGET = 32, 16, 2048, 1024
MAX_LEN = 4096
STEPS = SIZE
"""Decode steps of a turn: in that many each request gets a block once."""
META = torch.device("meta")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 100000,
    "max_position_embeddings": MAX_LEN,
    "torch_dtype": "bfloat16",
}


class Engine:
    """A scheduler whose requests all decode, and in place of a model made-up tokens.

    Args:
        folder: Holds the model's config.
        rows: Requests that run at one time.
        compressed: Whether compression is on.
        extra: Further settings of kv_compression.

    """

    def __init__(self, folder: str, rows: int, compressed: bool, extra: dict[str, Any]) -> None:
        compression = {"method": "uniform", "budget": BUDGET, "prefill": "full", **extra}
        self.config = _configure(folder, rows, compression if compressed else None)
        blocks = (rows * (PROMPT + BUDGET + 512) + 2 * MAX_LEN) // SIZE
        cls = ArenaScheduler if compressed else Scheduler
        spec = (ArenaSpec if compressed else FullAttentionSpec)(
            block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
        )
        self.config.cache_config.kv_cache_layout = "LBHNC"
        memory = blocks * LAYERS * spec.page_size_bytes
        specs: dict[str, KVCacheSpec] = {f"layer{i}": spec for i in range(LAYERS)}
        (pool,) = get_kv_cache_configs(self.config, [specs], [memory])
        self.config.cache_config.num_gpu_blocks = pool.num_blocks
        structured = StructuredOutputManager(self.config)
        self.scheduler = cls(self.config, pool, structured, block_size=SIZE)
        self._hasher = get_request_block_hasher(SIZE, sha256)
        self._added = 0

    def add(self, prompt_len: int, prefix: Sequence[int] = ()) -> None:
        """Queue a request; what is no prefix is unlike other prompts."""
        self._added += 1
        ids = [*prefix, self._added, *range(1, prompt_len - len(prefix))]
        params = SamplingParams(max_tokens=MAX_LEN - prompt_len, ignore_eos=True)
        name = f"chatcmpl-{self._added:032x}"
        self.scheduler.add_request(
            Request(name, ids, params, None, arrival_time=0.0, block_hasher=self._hasher)
        )

    def finish(self, output: SchedulerOutput) -> None:
        """Hand a made-up token for each request to the scheduler."""
        names = list(output.num_scheduled_tokens)
        index = {name: row for row, name in enumerate(names)}
        result = ModelRunnerOutput(names, index, sampled_token_ids=[[1]] * len(names))
        self.scheduler.update_from_output(output, result)


class Worker:
    """A session with tables for a device, its arrays on torch's device without memory."""

    def __init__(self, config: VllmConfig, rows: int, blocks: int) -> None:
        resolver = resolver_of(config, SIZE)
        geometry = PageGeometry(np.arange(LAYERS, dtype=np.int64) * blocks, 1, blocks, SIZE)
        flat = torch.empty(LAYERS * blocks, SIZE, 1, 64, dtype=torch.bfloat16, device=META)
        flat = flat.transpose(1, 2)
        self.limits = TableLimits(rows, resolver.row_blocks(MAX_LEN), rows)
        self.session = Session(
            resolver,
            geometry,
            flat,
            StridedPageCodec(flat, "auto", torch.bfloat16),
            [AttentionParams(32**-0.5, 0.0, None)] * LAYERS,
            4,
            torch.bfloat16,
            lambda arena: DeviceTableBuilder(arena, self.limits, META, implementation="triton"),
            self.limits,
        )

    def prefill(self, output: SchedulerOutput) -> None:
        """Take in a step of whole prompts, and cut each as if its tokens had been moved."""
        session = self.session
        session.begin_step(output)
        for new in output.scheduled_new_reqs:
            request = session._ledger[new.req_id]
            if request.schedule is None or not request.ends_at_cut:
                continue
            request.advance()
            own = request.private_blocks()
            session.arena.admit(
                new.req_id,
                own,
                deal_pages(session.arena.geometry, own, np.full(LAYERS, len(own))),
                num_tokens=new.prompt_len,
                growth_column=request.tail_start,
            )

    def common(self, names: Sequence[str], length: int) -> Any:
        """What the runner knows of a batch of one token a row, as in a FULL graph's replay."""
        rows = len(names)
        return SimpleNamespace(
            num_reqs=rows,
            block_table_tensor=torch.zeros(rows, self.limits.width, dtype=torch.int32, device=META),
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=META),
            query_start_loc=torch.zeros(rows + 1, dtype=torch.int32, device=META),
            query_start_loc_cpu=torch.arange(rows + 1, dtype=torch.int32),
            slot_mapping=torch.zeros(rows, dtype=torch.int64, device=META),
            seq_lens_cpu_upper_bound=torch.full((rows,), length, dtype=torch.int32),
        )

    def step(self, output: SchedulerOutput, names: Sequence[str], common: Any) -> None:
        """All that a step of a decoding batch asks of the session."""
        session = self.session
        session.begin_step(output)
        session.collects()
        session.replays = True
        session.prepare_step(names, common)
        session.end_step()


class World:
    """Both engines and the worker with some running rows."""

    def __init__(self, folder: str, rows: int, extra: dict[str, Any]) -> None:
        self.ours = Engine(folder, rows, True, extra)
        self.plain = Engine(folder, rows, False, {})
        self.worker = Worker(self.ours.config, rows, self.ours.config.cache_config.num_gpu_blocks)
        self.admitting: dict[str, float] = {}
        for name, engine in (("plain_admit", self.plain), ("admit", self.ours)):
            for index in range(rows):
                engine.add(PROMPT + index % SIZE)
            start = time.perf_counter()
            output = engine.scheduler.schedule()
            self.admitting[name] = (time.perf_counter() - start) * 1e6
            assert len(output.num_scheduled_tokens) == rows
            if engine is self.ours:
                self.worker.prefill(output)
            engine.finish(output)
        self.length = PROMPT + SIZE

    def turn(self) -> dict[str, float]:
        """Run some decode steps; return microseconds a step of each part."""
        spent: dict[str, float] = defaultdict(float)

        def timed(part: str, run: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = run()
            spent[part] += (time.perf_counter() - start) * 1e6 / STEPS
            return result

        gc.collect()
        gc.disable()
        for _ in range(STEPS):
            self.length += 1
            plain = timed("plain_schedule", self.plain.scheduler.schedule)
            self.plain.finish(plain)
            output = timed("schedule", self.ours.scheduler.schedule)
            names = list(output.num_scheduled_tokens)
            common = self.worker.common(names, self.length)
            timed("worker", partial(self.worker.step, output, names, common))
            self.ours.finish(output)
        gc.enable()
        spent["scheduler"] = spent["schedule"] - spent["plain_schedule"]
        return dict(spent)


def _configure(folder: str, rows: int, compression: dict[str, Any] | None) -> VllmConfig:
    arguments = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=MAX_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows * (PROMPT + SIZE), MAX_LEN),
        block_size=SIZE,
        additional_config={"kv_compression": compression} if compression else {},
    )
    # Blocks as a GPU has them, which CPU attention, of which nothing runs, could not read.
    with patch.dict(BLOCK_STEPS, cpu=1):
        return arguments.create_engine_config()


def main() -> None:
    """Answer one line on stdout for each on stdin, until that ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    JITFunction.run = lambda self, *args, **kwargs: None
    register()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        world: World | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            if "rows" in asked:
                world = None
                world = World(folder, asked["rows"], asked.get("extra", {}))
                result = world.admitting
            else:
                assert world is not None
                result = world.turn()
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()

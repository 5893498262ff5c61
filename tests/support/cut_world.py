"""Some requests of one worker without an engine, whose pages hold random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress_kernels.dispatch import Implementation
from vllm_kvcompress.eviction.compressor import Compressor
from vllm_kvcompress.eviction.cut_reporter import CutReporter
from vllm_kvcompress.eviction.records import CutRecord
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.shared_cuts import DueCut
from vllm_kvcompress.paging.arena import PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.paging.strided_codec import StridedPageCodec
from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver

LAYERS, HEADS, KV_HEADS, DIM, SIZE = 5, 4, 2, 8, 16
BLOCKS, BUDGET, BUFFER = 160, 48, 32


@dataclass
class World:
    """Some requests of one worker, whose pages hold random numbers."""

    implementation: Implementation
    config: dict[str, Any]
    layers: int = LAYERS
    cache: Tensor = field(init=False)

    def __post_init__(self) -> None:
        limits = EngineLimits(num_layers=self.layers, one_step_tokens=512)
        settings = {"budget": BUDGET, "decode_budget": BUDGET, "decode_buffer": BUFFER}
        policy = {"allow": {"method": True, "params": True, "keep": True}}
        config = KVCompressionConfig.parse({**settings, **policy, **self.config})
        self.resolver = SettingsResolver(config, SIZE, limits)
        self.random = torch.Generator().manual_seed(1)
        size = (self.layers * BLOCKS, KV_HEADS, SIZE, 2 * DIM)
        self.cache = torch.randn(size, generator=self.random)
        origin = np.arange(self.layers, dtype=np.int64) * BLOCKS
        self.arena = PageArena(PageGeometry(origin, 1, BLOCKS, SIZE))
        self.reporter = CutReporter(False, SIZE)
        self.reporter.records = []
        codec = StridedPageCodec(self.cache, "auto", torch.float32, self.implementation)
        params = AttentionParams(2.0 * DIM**-0.5, 0.0, None)
        self.compressor = Compressor(self.arena, codec, [params] * self.layers, self.reporter)
        self.next_block = 1

    def blocks(self, number: int) -> list[int]:
        self.next_block += number
        return list(range(self.next_block - number, self.next_block))

    def request(self, tokens: int, extra: dict[str, Any] | None = None) -> WorkerRequest:
        settings = self.resolver.resolve(extra, tokens)
        schedule = settings.schedule(tokens)
        assert schedule is not None
        blocks = self.blocks(cdiv(tokens, SIZE) + schedule.cut(1).blocks)
        request = WorkerRequest(tokens, settings, schedule, blocks, computed=0, scheduled=tokens)
        request.window = self.window(request)
        return request

    def window(self, request: WorkerRequest) -> Tensor | None:
        planner = request.settings.planner
        if not planner.needs_queries:
            return None
        return torch.randn(self.layers, planner.window, HEADS, DIM, generator=self.random)

    def begin_cascade(self, request: WorkerRequest) -> None:
        """Give a request the blocks of a cascade prefill in place of its own."""
        assert request.next_cut is not None
        whole = request.settings.planner.cascade_prefill_blocks(request.prompt_len)
        assert whole is not None
        request.prefill_blocks = whole
        request.blocks = self.blocks(whole + request.next_cut.blocks)

    def generate(self, name: str, request: WorkerRequest) -> None:
        """Let a request come to its next decode cut."""
        new = self.blocks(BUFFER // SIZE)
        request.blocks += new
        self.arena.grow({name: new})
        request.window = self.window(request)

    def cut(self, requests: dict[str, WorkerRequest], together: bool) -> None:
        if together:
            self.compressor.cut_all([DueCut(n, r, r.window) for n, r in requests.items()])
        for name, request in requests.items() if not together else ():
            self.compressor.cut(name, request, request.window)
        self.arena.check_integrity({n: r.private_blocks() for n, r in requests.items()})


def outcome(world: World, requests: dict[str, WorkerRequest]) -> tuple[Any, ...]:
    """All that must not depend on the way."""
    tables = [[p.tolist() for p in world.arena.layer_pages(name)] for name in requests]
    report = world.reporter.report
    assert world.reporter.records is not None
    records: dict[tuple[str, int], CutRecord] = {
        (record.request_id, record.number): record for record in world.reporter.records
    }
    kept = {key: [layer.tolist() for layer in record.kept] for key, record in records.items()}
    return tables, kept, dict(report.tokens_kept), report.layer_tokens_kept

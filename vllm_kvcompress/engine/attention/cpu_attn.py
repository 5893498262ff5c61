"""vLLM's CPU attention with per-layer page tables where the batch has compressed requests."""

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.attention.common import (
    ArenaBackend,
    ArenaBuilder,
    ArenaImpl,
    shallow_copy,
)
from vllm_kvcompress.engine.attention.cpu_codec import CpuPageCodec
from vllm_kvcompress.paging.arena import PageArena
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_tables import (
    LayerTables,
    StepTableBuilder,
    TableBuilder,
    TableLimits,
)


class ArenaCPUBackend(ArenaBackend, CPUAttentionBackend):
    """Registered over CPU_ATTN by the worker of an engine with compression on."""

    @staticmethod
    def get_impl_cls() -> type["ArenaCPUImpl"]:
        return ArenaCPUImpl

    @staticmethod
    def get_builder_cls() -> type["ArenaCPUMetadataBuilder"]:
        return ArenaCPUMetadataBuilder


class ArenaCPUMetadataBuilder(ArenaBuilder, CPUAttentionMetadataBuilder):
    """Plain metadata, plus one per layer for batches with compressed rows."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        base = super().build(common_prefix_len, common, fast_build)
        base.arena_step = step = self.step_inputs(common)
        if step is not None and step.tables is not None:
            base.arena_layers = self._build_layers(base, common.num_reqs, step.tables)
        return base

    def _build_layers(
        self, base: CPUAttentionMetadata, num_reqs: int, tables: LayerTables
    ) -> list[CPUAttentionMetadata]:
        """Copy a batch's metadata for each layer, with the layer's tables and schedule."""
        layers: list[CPUAttentionMetadata] = []
        # The kernel's schedule depends on the lengths alone, and layers may share them.
        schedules: dict[bytes, Tensor] = {}
        lengths = tables.seq_lens.numpy()
        longest: list[int] = lengths.max(axis=1).tolist()
        split = envs.VLLM_CPU_ATTN_SPLIT_KV
        for layer, (block_table, seq_lens, slots) in enumerate(tables.by_layer):
            key = lengths[layer].tobytes()
            if key not in schedules:
                # As vLLM's builder calls it; that builder would take twice as long, every layer.
                schedules[key] = ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=num_reqs,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_dim,
                    seq_lens=seq_lens,
                    dtype=self.dtype,
                    query_start_loc=base.query_start_loc,
                    causal=base.causal,
                    sliding_window_size=self.window_size,
                    isa=self.isa,
                    enable_kv_split=split,
                    dynamic_causal=base.dynamic_causal,
                    kv_cache_dtype=self.kv_cache_dtype,
                )
            own = shallow_copy(base)
            own.block_table, own.seq_lens, own.slot_mapping = block_table, seq_lens, slots
            own.max_seq_len = longest[layer]
            own.scheduler_metadata = schedules[key]
            layers.append(own)
        return layers


class ArenaCPUImpl(ArenaImpl, CPUAttentionBackendImpl):
    """The stock kernel, on the flat view of the pool where its layer's own tables say so."""

    def layer_metadata(self, base: Any, tables: LayerTables) -> CPUAttentionMetadata:
        return base.arena_layers[self.arena_layer]

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        step = self.session.step if self.session is not None else None
        if self.session is not None and step is not None and step.tables is not None:
            kv_cache = self.session.flat_cache
            slot_mapping = step.tables.slot_mapping[self.arena_layer]
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    @staticmethod
    def make_codec(
        flat_cache: Tensor, layer: Any, cache_dtype: str, dtype: torch.dtype
    ) -> PageCodec:
        return CpuPageCodec(flat_cache, layer.isa, cache_dtype, dtype)

    @staticmethod
    def make_tables(
        arena: PageArena, limits: TableLimits, device: torch.device
    ) -> StepTableBuilder:
        return TableBuilder(arena)

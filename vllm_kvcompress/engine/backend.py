"""vLLM's CPU attention with per-layer page tables where the batch has compressed requests."""

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

from vllm_kvcompress.engine.session import Session, StepPlan
from vllm_kvcompress.engine.settings import compression_of
from vllm_kvcompress.engine.spec import ArenaSpec
from vllm_kvcompress.tables import LayerTables


class ArenaCPUBackend(CPUAttentionBackend):
    """Registered over CPU_ATTN by the worker of an engine with compression on."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Put plain full attention under the arena; leave other engines' specs alone."""
        # Backend classes are shared by all engines of a process, settings are not.
        if compression_of(get_current_vllm_config_or_none()) is None:
            return spec
        if type(spec) is not FullAttentionSpec:
            return spec
        return replace_as(spec, ArenaSpec)

    @staticmethod
    def get_impl_cls() -> type["ArenaCPUImpl"]:
        """See the base class."""
        return ArenaCPUImpl

    @staticmethod
    def get_builder_cls() -> type["ArenaCPUMetadataBuilder"]:
        """See the base class."""
        return ArenaCPUMetadataBuilder


class ArenaCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plain metadata, plus one per layer for batches with compressed rows.

    Attributes:
        session: Set by the worker; None in an engine without compression.
        request_ids: Returns the batch's requests in row order; set by the worker.

    """

    session: Session | None = None
    request_ids: Any = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """See the base class."""
        common = common_attn_metadata
        base = super().build(common_prefix_len, common, fast_build)
        if self.session is None:
            return base
        step = self.session.plan_step(
            self.request_ids(common.num_reqs),
            common.block_table_tensor,
            common.seq_lens,
            common.query_start_loc,
            common.slot_mapping,
        )
        if step is not None:
            base.arena_step = step
            if step.tables is not None:
                base.arena_layers = self._build_layers(common_prefix_len, common, step.tables)
        return base

    def _build_layers(
        self, common_prefix_len: int, common: CommonAttentionMetadata, tables: LayerTables
    ) -> list[CPUAttentionMetadata]:
        layers: list[CPUAttentionMetadata] = []
        # The kernel's schedule depends on the lengths alone, and layers may share them.
        by_lengths: dict[bytes, CPUAttentionMetadata] = {}
        lengths = tables.seq_lens.numpy()
        own = copy.copy(common)
        own._num_computed_tokens_cache = None
        for layer in range(len(lengths)):
            key = lengths[layer].tobytes()
            if key in by_lengths:
                metadata = copy.copy(by_lengths[key])
                metadata.block_table = tables.block_tables[layer]
                metadata.slot_mapping = tables.slot_mapping[layer]
            else:
                own.block_table_tensor = tables.block_tables[layer]
                own.seq_lens = tables.seq_lens[layer]
                own.max_seq_len = int(lengths[layer].max())
                own.slot_mapping = tables.slot_mapping[layer]
                metadata = by_lengths[key] = super().build(common_prefix_len, own)
            layers.append(metadata)
        return layers


class ArenaCPUImpl(CPUAttentionBackendImpl):
    """The stock kernel, on the flat view of the pool where its layer's own tables say so.

    Attributes:
        session: Set by the worker; None in an engine without compression.
        arena_layer: Index of this layer in the arena.

    """

    session: Session | None = None
    arena_layer: int = -1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See the base class."""
        step: StepPlan | None = getattr(attn_metadata, "arena_step", None)
        if step is not None and self.session is not None and attn_metadata is not None:
            for capture in step.captures:
                capture.take(self.arena_layer, query)
            if step.tables is not None:
                kv_cache = self.session.flat_cache
                attn_metadata = attn_metadata.arena_layers[self.arena_layer]
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """See the base class."""
        step = self.session.step if self.session is not None else None
        if self.session is not None and step is not None and step.tables is not None:
            kv_cache = self.session.flat_cache
            slot_mapping = step.tables.slot_mapping[self.arena_layer]
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

"""What the wrapped attention backends share."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

from vllm_kvcompress.engine.attention import FP8_CACHES, PLAIN_CACHES
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.settings import compression_of
from vllm_kvcompress.engine.step.session import Session, StepInputs
from vllm_kvcompress.paging.arena import PageArena
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_tables import LayerTables, StepTableBuilder, TableLimits
from vllm_kvcompress.paging.strided_codec import StridedPageCodec


class ArenaBackend:
    """First base of a wrapped backend: gives plain full attention the arena's spec."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Put plain full attention under the arena; leave other engines' specs alone."""
        # Backend classes are shared by all engines of a process, settings are not.
        if compression_of(get_current_vllm_config_or_none()) is None:
            return spec
        if type(spec) is not FullAttentionSpec:
            return spec
        return replace_as(spec, ArenaSpec)


class ArenaBuilder:
    """First base of a wrapped metadata builder.

    Attributes:
        session: Set by the worker; None in an engine without compression.
        request_ids: Returns the batch's requests in row order; set by the worker.

    """

    session: Session | None = None
    request_ids: Callable[[int], Sequence[str]]

    def step_inputs(self, common: CommonAttentionMetadata) -> StepInputs | None:
        """Ask the session what this step needs. Mutates the session; None: plain vLLM's path."""
        if self.session is None:
            return None
        return self.session.prepare_step(self.request_ids(common.num_reqs), common)


class ArenaImpl:
    """First base of a wrapped attention implementation.

    Attributes:
        session: Set by the worker; None in an engine without compression.
        arena_layer: Index of this layer in the arena.
        cache_dtypes: vLLM's names of the cache dtypes that this backend's codec can move.
        on_device: Whether ``forward`` updates the cache, as ``forward_includes_kv_cache_update`` of
            the backend says, and scoring reads keys from the pages even where a step has them all.

    """

    session: Session | None = None
    arena_layer: int = -1
    cache_dtypes: tuple[str, ...] = PLAIN_CACHES
    on_device: bool = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See vLLM's AttentionImpl; on the flat view where the layer has tables of its own."""
        session = self.session
        step: StepInputs | None = getattr(attn_metadata, "arena_step", None)
        # Where a prompt's tokens are at hand, reading them back out of the CPU's pages costs more.
        keys, values = (None, None) if self.on_device else (key, value)
        if step is not None and session is not None:
            for capture in step.captures:
                capture.take(self.arena_layer, query)
                if capture.whole and keys is not None:
                    session.score(self.arena_layer, capture, keys)
            if step.query_buffer is not None:
                step.query_buffer.take(self.arena_layer, query)
            if step.tables is not None:
                kv_cache = session.flat_cache
                attn_metadata = self.layer_metadata(attn_metadata, step.tables)
        if self.on_device and attn_metadata is not None:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)  # type: ignore[attr-defined]
        result: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        if step is not None and session is not None:
            for row in step.cascades:
                session.cut_layer(self.arena_layer, row, keys, values)
        return result

    def layer_metadata(self, base: Any, tables: LayerTables) -> Any:
        """Return the batch's metadata with this layer's tables."""
        raise NotImplementedError

    @staticmethod
    def make_codec(
        flat_cache: Tensor, layer: Any, cache_dtype: str, dtype: torch.dtype
    ) -> PageCodec:
        """Return what reads and writes tokens of this backend's pages.

        Args:
            flat_cache: Flat view of the pool, logical [pages, N, block_size, 2 * D].
            layer: One attention layer.
            cache_dtype: vLLM's name of the cache dtype.
            dtype: The model's dtype.

        """
        raise NotImplementedError

    @staticmethod
    def make_tables(
        arena: PageArena, limits: TableLimits, device: torch.device
    ) -> StepTableBuilder:
        """Return what builds all layers' tables of a step for this backend."""
        raise NotImplementedError


class DeviceBuilder(ArenaBuilder):
    """Builder of backends whose kernels take tables and lengths from the device.

    All layers share one metadata object; a layer's own is a copy that differs in its tables, made
    where the layer's attention is called. Under a FULL CUDA graph that is at capture only: the
    tables lie in buffers that stay where they are and are filled before each replay.
    """

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """See vLLM's AttentionMetadataBuilder."""
        step = self.step_inputs(common_attn_metadata)
        if step is None or step.tables is None:
            base = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        else:
            # Lengths differ between layers, so no schedule can be made for all of them ahead of
            # time: `fast_build` leaves that to the kernel, which costs no launch per layer here.
            base = super().build(0, common_attn_metadata, fast_build=True)  # type: ignore[misc]
        base.arena_step = step
        return base

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """See vLLM's AttentionMetadataBuilder; the graph reads the per-layer buffers."""
        # No request runs while a graph is captured, so this is plain vLLM's metadata.
        base = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        if self.session is not None:
            base.arena_step = self.session.capture_inputs(base.seq_lens, len(base.slot_mapping))
        return base


class DeviceImpl(ArenaImpl):
    """Implementation of backends whose kernels take tables and lengths from the device.

    The cache is updated inside ``forward`` (see ``forward_includes_kv_cache_update`` of the
    backends): a separate update would take its slots from the runner, and could be captured in a
    piecewise CUDA graph with the slots of that moment.
    """

    cache_dtypes = (*PLAIN_CACHES, *FP8_CACHES)
    on_device = True

    def layer_metadata(self, base: Any, tables: LayerTables) -> Any:
        own = copy.copy(base)
        own.block_table = tables.block_tables[self.arena_layer]
        own.seq_lens = tables.seq_lens[self.arena_layer]
        own.slot_mapping = tables.slot_mapping[self.arena_layer]
        if tables.max_lens is not None:
            own.max_seq_len = tables.max_lens[self.arena_layer]
        return own

    @staticmethod
    def make_codec(
        flat_cache: Tensor, layer: Any, cache_dtype: str, dtype: torch.dtype
    ) -> PageCodec:
        return StridedPageCodec(flat_cache, cache_dtype, dtype)

    @staticmethod
    def make_tables(
        arena: PageArena, limits: TableLimits, device: torch.device
    ) -> StepTableBuilder:
        return DeviceTableBuilder(arena, limits, device, implementation="triton")

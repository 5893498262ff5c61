"""vLLM's FlashAttention (2 and 3) with per-layer page tables."""

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.attention.common import ArenaBackend, DeviceBuilder, DeviceImpl
from vllm_kvcompress.paging.page_tables import LayerTables


class ArenaFlashBackend(ArenaBackend, FlashAttentionBackend):
    """Registered over FLASH_ATTN by the worker of an engine with compression on."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type["ArenaFlashImpl"]:
        return ArenaFlashImpl

    @staticmethod
    def get_builder_cls() -> type["ArenaFlashMetadataBuilder"]:
        return ArenaFlashMetadataBuilder


class ArenaFlashMetadataBuilder(DeviceBuilder, FlashAttentionMetadataBuilder):
    """Plain metadata plus the step's per-layer tables."""


class ArenaFlashImpl(DeviceImpl, FlashAttentionImpl):
    """The stock kernel on the flat view of the pool."""

    def layer_metadata(self, base: Any, tables: LayerTables) -> Any:
        """See the base class; a schedule made for the logical lengths must not be used."""
        own = super().layer_metadata(base, tables)
        own.scheduler_metadata = None
        return own

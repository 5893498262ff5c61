"""vLLM's Triton attention with per-layer page tables."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.attention.common import ArenaBackend, DeviceBuilder, DeviceImpl


class ArenaTritonBackend(ArenaBackend, TritonAttentionBackend):
    """Registered over TRITON_ATTN by the worker of an engine with compression on."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type["ArenaTritonImpl"]:
        return ArenaTritonImpl

    @staticmethod
    def get_builder_cls() -> type["ArenaTritonMetadataBuilder"]:
        return ArenaTritonMetadataBuilder


class ArenaTritonMetadataBuilder(DeviceBuilder, TritonAttentionMetadataBuilder):
    """Plain metadata plus the step's per-layer tables."""


class ArenaTritonImpl(DeviceImpl, TritonAttentionImpl):
    """The stock kernel on the flat view of the pool."""

"""Which of the wrapped attention backends serves on a GPU, as vLLM's own code says.

Left to itself vLLM takes the backend that it likes best for a GPU, and that may be one without
per-layer tables (FlashInfer on Blackwell, and in front of TRITON_ATTN everywhere). What is known of
a layer only once it is made, such as attention sinks, decides too. So the choice is made where vLLM
makes it, in the worker and before weights are loaded, from the same candidates in the same order
but for those that are not wrapped.
"""

from collections.abc import Iterator
from typing import Any

import torch
from vllm import platforms
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_kvcompress.engine.attention import FP8_CACHES, GPU_BACKENDS
from vllm_kvcompress.engine.checks import DROP, Unsupported, cache_dtype_of, unsupported
from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.settings import compression_of

logger = init_logger("vllm.kvcompress.backend_choice")

_MOST_OF_VERSION_2 = 256
"""The largest head that FlashAttention 2 has kernels for; it has none with sinks."""


def check_backends(vllm_config: VllmConfig) -> None:
    """Refuse what no wrapped backend of this machine's GPU serves, before anything is loaded.

    Only the first of several places that ask: sinks are not known yet, and a process that takes
    requests may have no GPU.

    Args:
        vllm_config: A finished configuration.

    Raises:
        Unsupported: Says what to change.

    """
    platform = platforms.current_platform
    if platform.is_fp8_fnuz() and cache_dtype_of(vllm_config) in FP8_CACHES:
        raise unsupported(
            "an FP8 KV cache of AMD's own numbers (float8_e4m3fnuz) is not",
            "set --kv-cache-dtype to bfloat16",
        )
    if vllm_config.attention_config.backend is not None or not platform.is_cuda():
        return
    capability = platform.get_device_capability()
    if capability is None:
        return
    with set_current_vllm_config(vllm_config):
        config = _of_model(vllm_config)
        if not any(_serves(name, capability, config) for name in GPU_BACKENDS):
            raise _refusal(capability, config)


def serving_backends(capability: Any, head_size: int) -> list[str]:
    """Names of the wrapped backends that serve plain layers in half precision.

    Args:
        capability: Of the GPU.
        head_size: Elements of a head.

    """
    # Before bfloat16 vLLM serves models in float16.
    dtype = torch.bfloat16 if capability.major >= 8 else torch.float16
    config = AttentionSelectorConfig(
        head_size=head_size, dtype=dtype, kv_cache_dtype="auto", block_size=None
    )
    return [name for name in GPU_BACKENDS if _serves(name, capability, config)]


def choose_wrapped() -> None:
    """Let vLLM choose among the wrapped backends for layers of engines with compression on."""
    wrap_once(selector, "_cached_get_attn_backend", _choose_first)


def _choose_first(original: Any) -> Any:
    def _cached_get_attn_backend(
        backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Settings are those of the engine whose layers are made, not of the process.
        on = compression_of(get_current_vllm_config_or_none()) is not None
        if backend is None and on and platforms.current_platform.is_cuda():
            backend = _choose(attn_selector_config, num_heads)
        return original(backend, attn_selector_config, num_heads, *args, **kwargs)

    _cached_get_attn_backend.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    return _cached_get_attn_backend


def _choose(config: AttentionSelectorConfig, num_heads: int | None) -> AttentionBackendEnum:
    """Return the wrapped backend that vLLM likes best of those that serve a layer."""
    platform: Any = platforms.current_platform
    capability = platform.get_device_capability()
    valid, _ = platform.get_valid_backends(
        device_capability=capability, attn_selector_config=config, num_heads=num_heads
    )
    names = [candidate.backend.name for candidate in sorted(valid, key=lambda c: c.priority)]
    serving = [name for name in names if name in GPU_BACKENDS and _serves(name, capability, config)]
    if not serving:
        raise _refusal(capability, config)
    if serving[0] != names[0]:
        logger.info_once(
            "Attention backend %s in place of %s, vLLM's choice for this GPU, which does not work "
            "with --kv-compression",
            serving[0],
            names[0],
        )
    return AttentionBackendEnum[serving[0]]


def _serves(name: str, capability: Any, config: AttentionSelectorConfig) -> bool:
    """Whether a backend takes a layer; some of them say no only when its attention is made."""
    backend = AttentionBackendEnum[name].get_class()
    if backend.validate_configuration(device_capability=capability, **config._asdict()):
        return False
    make: Any = backend.get_impl_cls()
    cache_dtype, sinks = config.kv_cache_dtype, torch.zeros(1) if config.has_sink else None
    try:
        impl = make(1, config.head_size, 1.0, 1, None, None, cache_dtype, sinks=sinks)
    except (ValueError, NotImplementedError):  # how vLLM's attention refuses
        return False
    if name != "FLASH_ATTN":
        return True
    # vLLM asks for the version of the GPU; a layer's may be lower, and its first step would fail.
    version = impl.vllm_flash_attn_version
    needs_later = config.head_size > _MOST_OF_VERSION_2 or config.has_sink
    return version is not None and (version > 2 or not needs_later)


def _of_model(vllm_config: VllmConfig) -> AttentionSelectorConfig:
    """Return what a configuration says of the model's layers."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache_dtype_of(vllm_config),
        block_size=cache.block_size if cache.user_specified_block_size else None,
        has_sliding_window=model.get_sliding_window() is not None,
    )


def _changes(config: AttentionSelectorConfig) -> Iterator[tuple[str, str, AttentionSelectorConfig]]:
    """What may be in the way, how to change it, and the layer after that."""
    if config.kv_cache_dtype in FP8_CACHES:
        plain = "bfloat16" if config.dtype == torch.bfloat16 else "auto"
        yield (
            f"a KV cache of dtype {config.kv_cache_dtype}",
            f"set --kv-cache-dtype to {plain}",
            config._replace(kv_cache_dtype="auto"),
        )
    if config.block_size is not None:
        yield (
            f"a block size of {config.block_size}",
            "drop --block-size",
            config._replace(block_size=None),
        )


def _refusal(capability: Any, config: AttentionSelectorConfig) -> Unsupported:
    on = f"on a GPU of compute capability {capability.as_version_str()} is not"
    for what, change, other in _changes(config):
        if any(_serves(name, capability, other) for name in GPU_BACKENDS):
            return unsupported(f"{what} {on}", change)
    return unsupported(f"attention with heads of {config.head_size} {on}", DROP)

"""What is refused of a model's layers once they exist, where its configuration did not tell."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_kvcompress.engine.checks import DROP, SHARED_CACHES, Unsupported, unsupported


def check_specs(
    specs: Mapping[str, KVCacheSpec],
    layers: Mapping[str, Any],
    impl_cls: type[Any],
    backends: Sequence[str] = (),
) -> None:
    """Refuse models whose full-attention layers cannot share one arena.

    Args:
        specs: KV-cache spec by layer.
        layers: The model's attention layers by name; some may have no spec of their own.
        impl_cls: The attention implementation that every compressed layer must have.
        backends: Attention backends that a user can choose from on this device.

    Raises:
        Unsupported: Names the first layer that does not fit.

    """
    from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

    if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers.values()):
        raise unsupported(*SHARED_CACHES)
    first = next((name for name, spec in specs.items() if isinstance(spec, ArenaSpec)), None)
    for name, spec in specs.items():
        if type(spec) is SlidingWindowSpec and first is not None:
            if _page(spec) != _page(specs[first]):
                raise Unsupported(
                    f"layer {name} has pages of another size than full-attention layer {first}, "
                    "which is not supported with --kv-compression; drop the flag for this model"
                )
            continue
        _check_impl(name, layers[name], impl_cls, backends)
        if not isinstance(spec, ArenaSpec) or spec.sliding_window or spec.attention_chunk_size:
            raise Unsupported(
                f"layer {name} does not attend to the whole context ({type(spec).__name__}), "
                "which is not supported with --kv-compression but for sliding-window layers "
                "beside full-attention ones; drop the flag for this model"
            )
        heads = getattr(layers[name].impl, "num_heads", None)
        if first is not None and heads != getattr(layers[first].impl, "num_heads", None):
            raise Unsupported(
                f"layer {name} has another number of query heads ({heads}) than layer {first}, "
                "which is not supported with --kv-compression; drop the flag for this model"
            )
        if spec.non_causal:
            raise Unsupported(
                f"layer {name} sees later tokens (non-causal attention), which is not supported "
                "with --kv-compression; drop the flag for this model"
            )
        if first is not None and spec != specs[first]:
            raise Unsupported(
                f"layer {name} has another KV-cache shape than layer {first}, so they cannot "
                "share pages; drop --kv-compression"
            )


def _page(spec: KVCacheSpec) -> tuple[int, int]:
    return spec.page_size_bytes, spec.block_size


def _check_impl(name: str, layer: Any, impl_cls: type[Any], backends: Sequence[str]) -> None:
    """Refuse a layer whose attention is not ours or looks at positions that eviction changes."""
    impl: Any = getattr(layer, "impl", None)
    if not isinstance(impl, impl_cls):
        # On CUDA a model asks for such attention; elsewhere a platform may prefer it.
        choice = f"set --attention-backend to {' or '.join(backends)}, or " if backends else ""
        raise Unsupported(
            f"layer {name} uses attention {type(impl).__name__}, which is not supported with "
            f"--kv-compression; {choice}{DROP}"
        )
    if impl.kv_cache_dtype not in impl.cache_dtypes:
        raise Unsupported(
            f"layer {name} has a KV cache of dtype {impl.kv_cache_dtype}, which is not "
            f"supported with --kv-compression and {type(impl).__name__}; drop --kv-cache-dtype"
        )
    if getattr(impl, "alibi_slopes", None) is not None:
        # The kernel would take a survivor's place in the cache for its position in the text.
        raise Unsupported(
            f"layer {name} uses ALiBi, which is not supported with --kv-compression; "
            "drop the flag for this model"
        )

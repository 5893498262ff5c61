"""What is refused at start: each reason is one sentence that says what to change."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import vllm
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_kvcompress.engine.attention import BACKENDS, FP8_CACHES, GPU_BACKENDS, PLAIN_CACHES
from vllm_kvcompress.engine.hook_table import HOOKS
from vllm_kvcompress.engine.hooks import HookTable, differences
from vllm_kvcompress.engine.model_layers import layer_types, layers_of, layers_of_model

TESTED_VERSION = "0.32"

GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_OURS = "vllm_kvcompress.engine.worker"
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{_OURS}.cpu_worker.ArenaCPUWorker",
    GPU_WORKER: f"{_OURS}.gpu_worker.ArenaGPUWorker",
}
"""vLLM's worker -> ours."""


class Unsupported(ValueError):  # noqa: N818 - reads as a verdict
    """A combination that compression cannot serve correctly."""


def check_version(table: HookTable = HOOKS) -> None:
    """Refuse a vLLM that this package was not written against.

    Args:
        table: What is relied on.

    Raises:
        Unsupported: Names the version and, if something in the table differs, the first.

    """
    difference = next(differences(table), None)
    version = vllm.__version__
    if difference is None and version.startswith(f"{TESTED_VERSION}."):
        return
    detail = f" ({difference})" if difference else ""
    raise Unsupported(
        f"vLLM {version} is not supported by vllm_kvcompress{detail}; "
        f"install vllm {TESTED_VERSION} or start without --kv-compression"
    )


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse settings that compression cannot serve, before anything is loaded.

    Args:
        vllm_config: The finished configuration.

    Raises:
        Unsupported: The first reason found.

    """
    _check(_rules(vllm_config))


def check_model(model: ModelConfig) -> None:
    """Refuse a model that compression cannot serve, as far as its configuration shows it.

    Args:
        model: vLLM's configuration of the model; settings of an engine are not looked at.

    Raises:
        Unsupported: The first reason found.

    """
    _check(_model_rules(model))


Rule = tuple[bool, str, str]
"""Whether a refusal applies, what is not supported, and what to change."""

DROP = "drop the flag for this model"
PARALLEL = (
    "tensor or pipeline parallelism is not yet",
    "set --tensor-parallel-size and --pipeline-parallel-size to 1",
)
SHARED_CACHES = ("models whose layers share KV caches are not", DROP)
QUANTIZED_ON_CPU = ("a quantized KV cache on the CPU is not", "drop --kv-cache-dtype")


def unsupported(what: str, change: str) -> Unsupported:
    """Return the sentence of a refusal.

    Args:
        what: What is not supported, with its verb.
        change: What the user can do.

    """
    return Unsupported(f"{what} supported with --kv-compression; {change}")


def _check(rules: Iterable[Rule]) -> None:
    for applies, what, change in rules:
        if applies:
            raise unsupported(what, change)


def _rules(vllm_config: VllmConfig) -> list[Rule]:
    parallel = vllm_config.parallel_config
    worker = parallel.worker_cls
    return [
        *_model_rules(vllm_config.model_config),
        (
            vllm_config.kv_transfer_config is not None,
            "KV connectors are not",
            "drop --kv-transfer-config and --kv-offloading-size",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding is not",
            "drop --speculative-config",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism is not",
            "set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
        ),
        (parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1, *PARALLEL),
        (
            worker not in WORKERS,
            f"worker {worker} is not",
            "drop --worker-cls, and use vLLM on a GPU or its CPU build",
        ),
        (
            vllm_config.scheduler_config.scheduler_cls is not None,
            "a custom scheduler is not",
            "drop --scheduler-cls",
        ),
        (
            bool(layers_of(vllm_config).window_groups)
            and bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
            "a model with sliding-window layers but no hybrid KV cache manager is not",
            "drop --disable-hybrid-kv-cache-manager",
        ),
        *_cache_rules(vllm_config),
        *(_gpu_rules(vllm_config) if worker == GPU_WORKER else ()),
    ]


def _model_rules(model: ModelConfig) -> list[Rule]:
    groups, kinds = layers_of_model(model).full_groups, set(layer_types(model))
    return [
        (model.runner_type != "generate", "models that do not generate text are not", DROP),
        (model.is_encoder_decoder, "encoder-decoder models are not", DROP),
        (model.use_mla, "models with multi-head latent attention (MLA) are not", DROP),
        (
            model.is_attention_free or model.is_hybrid,
            "Mamba and other recurrent models are not",
            DROP,
        ),
        (model.is_mm_prefix_lm, "models whose images see later tokens are not", DROP),
        (
            bool(getattr(model.hf_text_config, "num_kv_shared_layers", 0)),
            *SHARED_CACHES,
        ),
        (
            model.attention_chunk_size is not None,
            "models with chunked local attention are not",
            DROP,
        ),
        (
            # vLLM gives every layer the window then (EngineArgs.create_engine_config).
            kinds <= {"sliding_attention"} and model.get_sliding_window() is not None,
            "models with a sliding window in every layer are not",
            DROP,
        ),
        (bool(model.uses_alibi), "models with ALiBi are not", DROP),
        (
            groups > 1,
            f"a model whose full-attention layers fill {groups} KV-cache groups is not",
            DROP,
        ),
    ]


def _cache_rules(vllm_config: VllmConfig) -> list[Rule]:
    """The KV cache and the attention that reads it."""
    cache = vllm_config.cache_config
    attention = vllm_config.attention_config
    chosen = attention.backend
    # Layers of other kinds are not compressed, and may have what attention they like.
    for_full = attention.backend_per_kind.get("full_attention", chosen)
    on_cpu = vllm_config.parallel_config.worker_cls != GPU_WORKER
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None) or {}
    backends = " or ".join(GPU_BACKENDS)
    return [
        (
            cache.cache_dtype not in (*PLAIN_CACHES, *FP8_CACHES),
            f"KV-cache dtype {cache.cache_dtype} is not",
            "drop --kv-cache-dtype or set it to fp8",
        ),
        (
            cache.cache_dtype in FP8_CACHES
            and on_cpu
            and (chosen is None or chosen.name == "CPU_ATTN"),
            *QUANTIZED_ON_CPU,
        ),
        (
            # Scoring multiplies the products of a layer by one number.
            cache.cache_dtype in FP8_CACHES and scheme.get("strategy") == "attn_head",
            "an FP8 KV cache with one scale per head is not",
            "set --kv-cache-dtype to bfloat16",
        ),
        (
            chosen is not None and chosen.name not in BACKENDS,
            f"attention backend {chosen.name if chosen else ''} is not",
            f"set --attention-backend to {backends}",
        ),
        (
            for_full is not None and for_full.name not in BACKENDS,
            f"attention backend {for_full.name if for_full else ''} of full attention is not",
            f"set full_attention in backend_per_kind to {backends}",
        ),
    ]


def _gpu_rules(vllm_config: VllmConfig) -> list[Rule]:
    """What only applies to GPUs."""
    compilation = vllm_config.compilation_config
    return [
        (
            not vllm_config.use_v2_model_runner,
            "model runner V1 on a GPU is not",
            "set VLLM_USE_V2_MODEL_RUNNER=1, or drop what makes vLLM fall back to V1",
        ),
        (
            compilation.cudagraph_mode == CUDAGraphMode.FULL,
            "CUDA graphs of mixed batches (cudagraph_mode FULL) are not",
            "set -cc.cudagraph_mode=FULL_AND_PIECEWISE, whose decode steps are FULL graphs too",
        ),
        (
            bool(vllm_config.parallel_config.enable_dbo),
            "dual batch overlap is not",
            "drop --enable-dbo",
        ),
    ]


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

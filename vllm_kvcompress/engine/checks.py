"""What is refused at start: each reason is one sentence that says what to change."""

from collections.abc import Iterable, Mapping
from typing import Any

import vllm
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig

from vllm_kvcompress.engine.attention import BACKENDS, FP8_CACHES, GPU_BACKENDS, PLAIN_CACHES
from vllm_kvcompress.engine.hook_table import HOOKS
from vllm_kvcompress.engine.hooks import HookTable, differences
from vllm_kvcompress.engine.model_layers import (
    layer_shapes,
    layer_types,
    layers_of,
    layers_of_model,
)

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
QUANTIZED_ON_CPU = (
    "a quantized KV cache on the CPU is not",
    "drop --kv-cache-dtype or set it to bfloat16",
)


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
    full, others = layer_shapes(model)
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
        (
            # vLLM ends on an assertion, or builds them without their windows (mixtures of experts).
            {"sliding_attention", "full_attention"} <= kinds
            and model.hf_text_config.model_type.startswith(("qwen2", "qwen3")),
            "Qwen models with sliding windows in some layers are not",
            "set use_sliding_window to false and drop layer_types in the model's config.json",
        ),
        (
            bool(model.uses_alibi) or "Step1ForCausalLM" in model.architectures,
            "models with ALiBi are not",
            DROP,
        ),
        (
            len(full) > 1,
            "models whose full-attention layers differ in heads or head size are not",
            DROP,
        ),
        (
            len({shape.page for shape in full + others}) > 1,
            "models whose sliding-window layers have pages of another size are not",
            DROP,
        ),
        (
            groups > 1,
            f"a model whose full-attention layers fill {groups} KV-cache groups is not",
            DROP,
        ),
    ]


def _cache_rules(vllm_config: VllmConfig) -> list[Rule]:
    """The KV cache and the attention that reads it."""
    attention = vllm_config.attention_config
    chosen = attention.backend
    # Layers of other kinds are not compressed, and may have what attention they like.
    for_full = attention.backend_per_kind.get("full_attention", chosen)
    on_cpu = vllm_config.parallel_config.worker_cls != GPU_WORKER
    dtype, scheme = cache_dtype_of(vllm_config), _scheme(vllm_config)
    backends = " or ".join(GPU_BACKENDS)
    # Another backend on the CPU is a test's, as in tests/e2e/gpu_worker_stand_in.py.
    device = "cpu" if on_cpu and (chosen is None or chosen.name == "CPU_ATTN") else "gpu"
    return [
        *kernel_rules(
            device,
            vllm_config.cache_config.block_size,
            vllm_config.model_config.get_head_size(),
        ),
        (
            dtype not in (*PLAIN_CACHES, *FP8_CACHES),
            f"KV-cache dtype {dtype} is not",
            "drop --kv-cache-dtype or set it to fp8",
        ),
        (
            dtype in FP8_CACHES and device == "cpu",
            *QUANTIZED_ON_CPU,
        ),
        (
            # Scoring multiplies the products of a layer by one number.
            dtype in FP8_CACHES and scheme.get("strategy") == "attn_head",
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


def cache_dtype_of(vllm_config: VllmConfig) -> str:
    """Return vLLM's name of the dtype that layers will have in their cache.

    Some checkpoints ask for an FP8 cache where the user does not choose; vLLM looks at that when it
    makes the layers.
    """
    dtype: str = vllm_config.cache_config.cache_dtype
    return "fp8" if dtype == "auto" and _scheme(vllm_config) else dtype


BLOCK_STEPS = {"cpu": 32, "gpu": 16}
"""Tokens of which attention's kernels on each device want a multiple in a block."""


def kernel_rules(device: str, block_size: int | None, head_size: int) -> list[Rule]:
    """What attention's kernels cannot do, which vLLM says only once it has made the model.

    Args:
        device: ``gpu`` or ``cpu``.
        block_size: Tokens per block; None: vLLM chooses.
        head_size: Elements of a head.

    """
    step, unserved = BLOCK_STEPS[device], False
    if device == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        unserved = head_size not in CPUAttentionBackend.get_supported_head_sizes()
    return [
        (
            bool(block_size and block_size % step),
            f"a block size of {block_size} is not",
            f"set --block-size to a multiple of {step}",
        ),
        (
            unserved,
            f"attention with heads of {head_size} on the CPU is not",
            "take another model, as plain vLLM has no kernel for it there either",
        ),
    ]


def check_kernels(device: str, block_size: int, head_size: int) -> None:
    """Refuse what attention's kernels cannot do; see :func:`kernel_rules`.

    Raises:
        Unsupported: The first reason found.

    """
    _check(kernel_rules(device, block_size, head_size))


def _scheme(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """What a checkpoint says of an FP8 cache; empty: nothing."""
    return getattr(vllm_config.quant_config, "kv_cache_scheme", None) or {}


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

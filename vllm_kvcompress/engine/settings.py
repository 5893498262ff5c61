"""Find this engine's settings in a vLLM config."""

import json
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig

from vllm_kvcompress.config import CONFIG_KEY, KVCompressionConfig
from vllm_kvcompress.engine.layers import layers_of
from vllm_kvcompress.planner import Limits, Planner

DECODE_KEY = "kv_compression_decode"
"""In a request's ``extra_args``: false leaves its generated tokens alone."""


def compression_of(vllm_config: VllmConfig | None) -> KVCompressionConfig | None:
    """Return the settings, or None where nobody asked for compression.

    Args:
        vllm_config: The engine's configuration, if there is one.

    """
    extra = getattr(vllm_config, "additional_config", None)
    if not isinstance(extra, dict) or extra.get(CONFIG_KEY) is None:
        return None
    return KVCompressionConfig.parse(extra[CONFIG_KEY])


def planner_of(vllm_config: VllmConfig, block_size: int) -> Planner:
    """Make the planner that scheduler and worker share.

    Args:
        vllm_config: A configuration with compression on.
        block_size: Tokens per block.

    Raises:
        ValueError: Compression is off, the budget does not fit the block size, or the prefill the
            model.

    """
    config = compression_of(vllm_config)
    if config is None:
        raise ValueError("planner_of needs a configuration with compression on")
    scheduler, layers = vllm_config.scheduler_config, layers_of(vllm_config)
    if layers.side_groups and config.prefill == "cascade":
        raise ValueError(
            "kv_compression: prefill cascade is not supported for models with sliding-window "
            "layers, which need blocks for the whole prompt in that step; set prefill to auto"
        )
    one_step = [
        scheduler.max_num_batched_tokens,
        scheduler.max_num_scheduled_tokens,
        scheduler.long_prefill_token_threshold,
    ]
    limits = Limits(
        num_layers=layers.compressed,
        one_step_tokens=min(int(tokens) for tokens in one_step if tokens),
        lag=int(bool(scheduler.async_scheduling)),
        alone=not layers.side_groups,
    )
    return _planner(json.dumps(config.as_dict(), sort_keys=True), block_size, limits)


@lru_cache(maxsize=16)
def _planner(settings: str, block_size: int, limits: Limits) -> Planner:
    # vLLM asks for sizes many times, and what a planner has worked out it remembers.
    return Planner(KVCompressionConfig.parse(json.loads(settings)), block_size, limits)


def cuts_while_decoding(sampling_params: Any) -> bool:
    """Whether a request wants its generated tokens cut back where the engine does that.

    Args:
        sampling_params: vLLM's, or None.

    Raises:
        ValueError: The setting is not true or false.

    """
    wanted = (getattr(sampling_params, "extra_args", None) or {}).get(DECODE_KEY, True)
    if not isinstance(wanted, bool):
        raise ValueError(f"{DECODE_KEY} must be true or false, got {wanted!r}")
    return wanted

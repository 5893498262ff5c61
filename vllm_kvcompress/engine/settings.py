"""Find this engine's settings in a vLLM config."""

import json
from functools import lru_cache

from vllm.config import VllmConfig

from vllm_kvcompress.engine.model_layers import layers_of
from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.config import CONFIG_KEY, KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver


def compression_of(vllm_config: VllmConfig | None) -> KVCompressionConfig | None:
    """Return the settings, or None where nobody asked for compression.

    Args:
        vllm_config: The engine's configuration, if there is one.

    """
    extra = getattr(vllm_config, "additional_config", None)
    if not isinstance(extra, dict) or extra.get(CONFIG_KEY) is None:
        return None
    return KVCompressionConfig.parse(extra[CONFIG_KEY])


def resolver_of(vllm_config: VllmConfig, block_size: int) -> SettingsResolver:
    """Return the engine's resolver of request settings; all its processes make an equal one.

    Args:
        vllm_config: A configuration with compression on.
        block_size: Tokens per block.

    Raises:
        ValueError: Compression is off, the budget does not fit the block size, or the prefill the
            model.

    """
    config = compression_of(vllm_config)
    if config is None:
        raise ValueError("resolver_of needs a configuration with compression on")
    scheduler, layers = vllm_config.scheduler_config, layers_of(vllm_config)
    one_step = [
        scheduler.max_num_batched_tokens,
        scheduler.max_num_scheduled_tokens,
        scheduler.long_prefill_token_threshold,
    ]
    limits = EngineLimits(
        num_layers=layers.compressed,
        one_step_tokens=min(int(tokens) for tokens in one_step if tokens),
        lag=int(bool(scheduler.async_scheduling)),
        alone=not layers.window_groups,
    )
    return _resolver(json.dumps(config.as_dict(), sort_keys=True), block_size, limits)


@lru_cache(maxsize=16)
def _resolver(settings: str, block_size: int, limits: EngineLimits) -> SettingsResolver:
    # vLLM asks for sizes many times, and what a planner has worked out it remembers.
    return SettingsResolver(KVCompressionConfig.parse(json.loads(settings)), block_size, limits)

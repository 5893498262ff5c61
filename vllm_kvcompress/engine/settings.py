"""Find this engine's settings in a vLLM config."""

from vllm.config import VllmConfig

from vllm_kvcompress.config import CONFIG_KEY, KVCompressionConfig, Planner


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
        ValueError: Compression is off, or the budget does not fit the block size.

    """
    config = compression_of(vllm_config)
    if config is None:
        raise ValueError("planner_of needs a configuration with compression on")
    return Planner(config, block_size)

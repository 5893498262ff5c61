"""vLLM's old variable for the KV cache on a CPU, which overrules kv_cache_memory_bytes."""

import os

from vllm_kvcompress.tools.arguments import CommandError

VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def kv_space() -> str:
    """Return the variable's value, a number of GiB; empty: vLLM does not look at it."""
    return os.environ.get(VARIABLE, "")


def check_kv_space(size: str) -> None:
    """Refuse a size of the KV cache that vLLM would not take. Imports vLLM.

    Args:
        size: Where the size comes from, for the message.

    Raises:
        CommandError: The variable is set, on a CPU.

    """
    if not kv_space():
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        raise CommandError(
            f"{VARIABLE}={kv_space()} would overrule {size} without a word from vLLM; unset it"
        )

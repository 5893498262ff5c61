"""Turn a finished vLLM config into one with compression on."""

from vllm.config import VllmConfig

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine.checks import WORKERS, check_config
from vllm_kvcompress.engine.metrics import export_books
from vllm_kvcompress.engine.requests import guard_requests
from vllm_kvcompress.engine.settings import plans_of


def switch_on(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Name our worker and scheduler in the config. Mutates vllm_config.

    Args:
        vllm_config: The finished configuration.
        config: Checked settings.

    Raises:
        ValueError: A combination that is not supported, or a budget too small for the blocks.

    """
    check_config(vllm_config)
    if vllm_config.cache_config.block_size:
        plans_of(vllm_config, vllm_config.cache_config.block_size)
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = "vllm_kvcompress.engine.scheduler." + (
        "ArenaAsyncScheduler" if asynchronous else "ArenaScheduler"
    )
    guard_requests()
    export_books()

"""Turn a finished vLLM config into one with compression on."""

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine.checks import WORKERS, check_config
from vllm_kvcompress.engine.settings import compression_of

_MARK = "_kv_compression_wrapped"


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
        config.check_block_size(vllm_config.cache_config.block_size)
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = "vllm_kvcompress.engine.scheduler." + (
        "ArenaAsyncScheduler" if asynchronous else "ArenaScheduler"
    )
    _refuse_streaming_input()


def _refuse_streaming_input() -> None:
    """Answer requests whose prompt arrives in parts with an error; idempotent."""
    if getattr(InputProcessor, _MARK, False):
        return
    setattr(InputProcessor, _MARK, True)
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.resumable and compression_of(self.vllm_config) is not None:
            raise ValueError(
                "streaming input is not supported with --kv-compression; send the whole prompt"
            )
        return request

    InputProcessor.process_inputs = process_inputs

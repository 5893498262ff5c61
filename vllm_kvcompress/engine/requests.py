"""What one request asks for, checked in the process that takes it in: what is wrong is a 400."""

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.engine.model_layers import pool_for_arena
from vllm_kvcompress.engine.settings import compression_of, resolver_of
from vllm_kvcompress.planning.request_settings import SettingsResolver

_MARK = "_kv_compression_wrapped"
_PLANS = "_kv_compression_plans"

_LONGEST = 500
"""Characters of an error message."""


def guard_requests() -> None:
    """Check every request of engines with compression on; idempotent."""
    if getattr(InputProcessor, _MARK, False):
        return
    setattr(InputProcessor, _MARK, True)
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if compression_of(self.vllm_config) is not None:
            check_request(request, self)
        return request

    InputProcessor.process_inputs = process_inputs


def check_request(request: Any, processor: Any) -> None:
    """Refuse what cannot be served, and end a generation where the pool does.

    Args:
        request: vLLM's EngineCoreRequest; its default number of tokens may be lowered.
        processor: vLLM's InputProcessor of an engine with compression on.

    Raises:
        VLLMValidationError: One sentence that names the setting and what to change.

    """
    if request.resumable:
        raise VLLMValidationError(
            "streaming input is not supported with --kv-compression; send the whole prompt"
        )
    params = request.sampling_params
    config = processor.vllm_config
    blocks = config.cache_config.num_gpu_blocks
    ids = request.prompt_token_ids
    prompt_len = len(ids) if ids is not None else len(request.prompt_embeds)
    try:
        settings = _resolver(processor).resolve(getattr(params, "extra_args", None), prompt_len)
    except ValueError as error:
        raise VLLMValidationError(_printable(error)) from None
    if not blocks or params is None or params.max_tokens is None:
        return
    # With data parallelism the number is that of all engines; each has its own pool.
    pool = int(blocks) // config.parallel_config.data_parallel_size - 1
    planner, decode = settings.planner, settings.decode
    pool = pool_for_arena(config, pool, planner.block_size)
    if planner.peak_blocks(prompt_len, prompt_len + params.max_tokens, decode) <= pool:
        return
    max_len = config.model_config.max_model_len
    room = planner.most_tokens(prompt_len, max_len, pool, decode) - prompt_len
    if room > 0 and prompt_len + params.max_tokens >= max_len:
        # What a request gets that names no limit: up to the end of the context.
        params.max_tokens = room
        return
    raise VLLMValidationError(
        f"max_tokens {params.max_tokens} is too large: with a prompt of {prompt_len} tokens the "
        f"KV cache has room for {max(room, 0)} generated tokens; lower max_tokens"
    )


def _printable(error: ValueError) -> str:
    """An error's sentence as it can be sent: it may quote whatever the request held."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _resolver(processor: Any) -> SettingsResolver:
    resolver: SettingsResolver | None = getattr(processor, _PLANS, None)
    if resolver is None:
        config = processor.vllm_config
        resolver = resolver_of(config, config.cache_config.block_size)
        setattr(processor, _PLANS, resolver)
    return resolver

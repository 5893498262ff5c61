"""Checks of a request's settings in the server's process: a wrong one is answered with a 400."""

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.model_layers import pool_for_arena
from vllm_kvcompress.engine.settings import compression_of, resolver_of

_LONGEST = 500
"""Most characters of an error message."""


def guard_requests() -> None:
    """Check every request of engines with compression on; idempotent."""

    def make_checking(original: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            if compression_of(self.vllm_config) is not None:
                check_request(request, self.vllm_config)
            return request

        return process_inputs

    wrap_once(InputProcessor, "process_inputs", make_checking)


def check_request(request: Any, config: VllmConfig) -> None:
    """Refuse what cannot be served, and limit how much is generated to what the pool can hold.

    Args:
        request: vLLM's EngineCoreRequest. Mutated: where the client named no limit, max_tokens is
            lowered to what the pool has room for.
        config: Of an engine with compression on.

    Raises:
        VLLMValidationError: One sentence that names the setting and what to change.

    """
    if request.resumable:
        raise VLLMValidationError(
            "streaming input is not supported with --kv-compression; send the whole prompt"
        )
    params = request.sampling_params
    blocks = config.cache_config.num_gpu_blocks
    ids = request.prompt_token_ids
    prompt_len = len(ids) if ids is not None else len(request.prompt_embeds)
    try:
        resolver = resolver_of(config, config.cache_config.block_size)
        settings = resolver.resolve(getattr(params, "extra_args", None), prompt_len)
    except ValueError as error:
        raise VLLMValidationError(_printable(error)) from None
    if not blocks or params is None or params.max_tokens is None:
        return
    # With data parallelism this is the sum over all engines, each of which has its own pool.
    pool = int(blocks) // config.parallel_config.data_parallel_size - 1
    planner, decode = settings.planner, settings.decode
    pool = pool_for_arena(config, pool, planner.block_size)
    if planner.peak_blocks(prompt_len, prompt_len + params.max_tokens, decode) <= pool:
        return
    max_len = config.model_config.max_model_len
    room = planner.most_tokens(prompt_len, max_len, pool, decode) - prompt_len
    if room > 0 and prompt_len + params.max_tokens >= max_len:
        # vLLM's default for a request that names no limit is the rest of the context.
        params.max_tokens = room
        return
    raise VLLMValidationError(
        f"max_tokens {params.max_tokens} is too large: with a prompt of {prompt_len} tokens the "
        f"KV cache has room for {max(room, 0)} generated tokens; lower max_tokens"
    )


def _printable(error: ValueError) -> str:
    """Make an error one line that is safe to send: it may quote anything that the request held."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in str(error)
    )
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

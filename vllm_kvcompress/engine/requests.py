"""Checks of a request's settings in the server's process: a wrong one is answered with a 400."""

from typing import Any

from vllm.config import ParallelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.judgement import answer_limit, check_form, printable
from vllm_kvcompress.engine.settings import compression_of, resolver_of


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
    params = request.sampling_params
    try:
        check_form(params, request.resumable)
        ids, cache = request.prompt_token_ids, config.cache_config
        prompt_len = len(ids) if ids is not None else len(request.prompt_embeds)
        resolver = resolver_of(config, cache.block_size)
        settings = resolver.resolve(getattr(params, "extra_args", None), prompt_len)
        # A sum over engines, each of which has its own pool.
        blocks = (cache.num_gpu_blocks or 0) // engines_of(config.parallel_config)
        limit = answer_limit(config, settings, params, prompt_len, blocks)
    except ValueError as error:
        raise VLLMValidationError(printable(error)) from None
    if limit is not None:
        params.max_tokens = limit


def engines_of(parallel: ParallelConfig) -> int:
    """How many engines this process sends its requests to."""
    if parallel.data_parallel_rank_local is not None:  # each rank of an offline run has its own
        return 1
    if parallel.local_engines_only:
        return int(parallel.data_parallel_size_local)
    return int(parallel.data_parallel_size)

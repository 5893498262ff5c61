"""Whether an engine can serve a request, judged alike where it comes in and in the scheduler."""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig

from vllm_kvcompress.engine.model_layers import pool_for_arena
from vllm_kvcompress.planning.answer_room import answer_tokens
from vllm_kvcompress.planning.pinned_ranges import shown
from vllm_kvcompress.planning.request_settings import RequestSettings

_LONGEST = 500
"""Most characters of an error message."""


def check_form(params: Any, resumable: bool) -> None:
    """Refuse what no settings make sense of.

    Args:
        params: The request's SamplingParams, or what another kind of request has in their place.
        resumable: Whether more of the prompt is to come.

    Raises:
        ValueError: One sentence that names what is wrong and what to change.

    """
    if resumable:
        raise ValueError(
            "streaming input is not supported with --kv-compression; send the whole prompt"
        )
    extra = getattr(params, "extra_args", None)
    # All that reads them, here and in vLLM, looks up names.
    if extra is not None and not (
        isinstance(extra, Mapping) and all(isinstance(name, str) for name in extra)
    ):
        raise ValueError(f"extra_args must be a mapping with names as keys, got {shown(extra)}")


def answer_limit(
    config: VllmConfig, settings: RequestSettings, params: Any, prompt_len: int, blocks: int
) -> int | None:
    """Return how many tokens a request may generate, None if there is nothing to say.

    Args:
        config: Of an engine with compression on.
        settings: What the request gets.
        params: As for :func:`check_form`.
        prompt_len: Prompt tokens.
        blocks: Blocks of the engine's pool, the null block included; 0 if that is not known.

    Raises:
        ValueError: The pool has no room for it.

    """
    max_tokens: int | None = getattr(params, "max_tokens", None)
    if not blocks or max_tokens is None:
        return None
    pool = pool_for_arena(config, blocks - 1, settings.planner.block_size)
    longest = config.model_config.max_model_len
    return answer_tokens(settings, prompt_len, max_tokens, longest, pool)


def printable(error: Exception) -> str:
    """Make an error one line that is safe to send: it may quote anything that the request held."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in str(error)
    )
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

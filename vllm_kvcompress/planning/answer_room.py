"""How much a request can generate: never more than the pool has room for."""

from vllm_kvcompress.planning.request_settings import RequestSettings


def answer_tokens(
    settings: RequestSettings, prompt_len: int, max_tokens: int, max_len: int, pool_blocks: int
) -> int:
    """Return the most tokens that a request may generate.

    Args:
        settings: What the request gets.
        prompt_len: Prompt tokens.
        max_tokens: Generated tokens that it asks for.
        max_len: Most tokens of any request.
        pool_blocks: Blocks that the compressed layers of one request can have.

    Returns:
        What it asks for. If that is all the context has left, which is vLLM's default for a request
        that names no limit, what the pool has room for.

    Raises:
        ValueError: The pool has no room for it.

    """
    planner, decode = settings.planner, settings.decode
    if planner.peak_blocks(prompt_len, prompt_len + max_tokens, decode) <= pool_blocks:
        return max_tokens
    room = planner.most_tokens(prompt_len, max_len, pool_blocks, decode) - prompt_len
    if room > 0 and prompt_len + max_tokens >= max_len:
        return room
    raise ValueError(
        f"max_tokens {max_tokens} is too large: with a prompt of {prompt_len} tokens the "
        f"KV cache has room for {max(room, 0)} generated tokens; lower max_tokens"
    )

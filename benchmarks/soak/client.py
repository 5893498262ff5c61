"""Sends requests with OpenAI's client, and says what is wrong with an answer by itself."""

import json
from typing import Any

from openai import AsyncOpenAI

from benchmarks.soak.asks import Answer, Ask

NAME = "soak"
"""The name under which the server serves its model."""

ADAPTER = "adapter"
"""The name of its LoRA adapter."""


def make_client(url: str, seconds: float) -> AsyncOpenAI:
    """Return a client that never retries.

    Args:
        url: Of the server, without a path.
        seconds: Longest wait for the next byte.

    """
    return AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        timeout=seconds,
        max_retries=0,
        # vLLM's server closes a connection that was idle for 5 seconds, perhaps just when the next
        # request is sent on it. Other clients retry then.
        default_headers={"Connection": "close"},
    )


async def send(
    client: AsyncOpenAI,
    ask: Ask,
    *,
    streamed: bool = False,
    extra: dict[str, Any] | None = None,
    leave_after: int | None = None,
) -> Answer:
    """Send a request and collect its answer.

    Args:
        client: Where to.
        ask: What is asked.
        streamed: Whether the answer is streamed.
        extra: More of the body, for this time only.
        leave_after: Events of the stream after which this client goes away; None: it stays.

    Raises:
        openai.OpenAIError: As the client says it.

    """
    rest = {"return_token_ids": True, **ask.body, **(extra or {})}
    model = rest.pop("model", NAME)
    create: Any
    if ask.chat:
        create, text = client.chat.completions.create, {"messages": rest.pop("messages")}
    else:
        create, text = client.completions.create, {"prompt": rest.pop("prompt")}
    answer = Answer()
    if not streamed:
        whole = await create(model=model, **text, extra_body=rest)
        answer.add(whole.model_dump())
        return answer
    rest["stream_options"] = {"include_usage": True}
    stream = await create(model=model, **text, stream=True, extra_body=rest)
    async with stream:
        events = 0
        async for event in stream:
            answer.add(event.model_dump())
            events += 1
            if events == leave_after:
                break
    return answer


def complaint(ask: Ask, answer: Answer) -> str | None:
    """Say what is wrong with a whole answer, whatever the model; None if nothing is."""
    body = ask.body
    prompts = body.get("prompt", "")
    several = isinstance(prompts, list) and isinstance(prompts[0], str | list)
    wanted = body.get("n", 1) * (len(prompts) if several else 1)
    if sorted(answer.choices) != list(range(wanted)):
        return f"has choices {sorted(answer.choices)} instead of {wanted}"
    generated = 0
    for choice in answer.choices.values():
        generated += len(choice.tokens)
        if choice.finish not in ("stop", "length", "tool_calls"):
            return f"ended with {choice.finish!r}"
        if len(choice.tokens) > body["max_tokens"]:
            return f"has {len(choice.tokens)} tokens, asked for {body['max_tokens']}"
        if choice.finish == "length" and len(choice.tokens) < body["max_tokens"]:
            return f"ended for its length after {len(choice.tokens)} of {body['max_tokens']} tokens"
        if len(choice.tokens) < body.get("min_tokens", 0):
            return f"has {len(choice.tokens)} tokens, asked for {body['min_tokens']} at least"
        if "logprobs" in body and len(choice.logprobs) < len(choice.tokens):
            return f"has {len(choice.logprobs)} log-probabilities of {len(choice.tokens)} tokens"
        if not body.get("include_stop_str_in_output") and not body.get("echo"):
            found = [stop for stop in body.get("stop", ()) if stop in choice.text]
            if found and not body.get("min_tokens"):
                return f"has the stop string {found[0]!r}"
        if choice.finish == "stop" and "response_format" in body:
            try:
                json.loads(choice.text)
            except ValueError:
                return "is no JSON although a schema was given"
    if answer.completion_tokens != generated:
        return f"has {generated} tokens, and its usage says {answer.completion_tokens}"
    return None

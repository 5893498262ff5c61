"""What a client asks, and what came back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        kind: Which part of the traffic it belongs to.
        chat: Whether it goes to /v1/chat/completions rather than /v1/completions.
        body: The JSON object that is sent, but for ``stream`` and ``priority``.
        same_alone: Whether plain vLLM answers it alone as in a crowd: greedy, or seeded.
        refused: Whether a 400 is the right answer.

    """

    kind: str
    chat: bool
    body: Mapping[str, Any]
    same_alone: bool = True
    refused: bool = False

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def streams(self) -> bool:
        """Whether vLLM can stream the answer."""
        return "prompt_logprobs" not in self.body

    @property
    def key(self) -> str:
        """Equal for requests that must get equal answers."""
        return json.dumps([self.path, self.body], sort_keys=True)


@dataclass
class Choice:
    """One of the answers to a request.

    Attributes:
        tokens: Ids of the generated tokens.
        text: What a client reads, names and arguments of tools included.
        finish: Why it ended.
        logprobs: Of each generated token, in nats; empty if not asked for.
        tops: Log-probabilities of the likeliest tokens by id at each place; empty likewise.

    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Answer:
    """All that came back for a request, in one piece or streamed.

    Attributes:
        choices: By index.
        prompt_tokens: As the server counted them.
        completion_tokens: Likewise, of all choices.
        prompt_logprobs: Of each prompt token but the first, in nats; empty if not asked for.

    """

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)

    def add(self, part: Mapping[str, Any]) -> None:
        """Enter a whole answer or one event of a stream, as JSON."""
        if usage := part.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage.get("completion_tokens") or 0
        prompt = part.get("prompt_logprobs")
        for choice in part.get("choices", ()):
            mine = self.choices.setdefault(choice["index"], Choice())
            message = choice.get("message") or choice.get("delta") or {}
            mine.text += choice.get("text") or message.get("content") or ""
            for call in message.get("tool_calls") or ():
                function = call["function"]
                mine.text += (function.get("name") or "") + (function.get("arguments") or "")
            mine.tokens += choice.get("token_ids") or ()
            mine.finish = choice.get("finish_reason") or mine.finish
            _add_logprobs(mine, choice.get("logprobs") or {})
            prompt = prompt or choice.get("prompt_logprobs")
        for place in prompt or ():
            # The prompt's own token comes first, whatever its rank.
            if place:
                self.prompt_logprobs.append(next(iter(place.values()))["logprob"])


def _add_logprobs(choice: Choice, found: Mapping[str, Any]) -> None:
    for place in found.get("content") or ():  # a chat's
        choice.logprobs.append(place["logprob"])
        choice.tops.append({_id(top["token"]): top["logprob"] for top in place["top_logprobs"]})
    choice.logprobs += found.get("token_logprobs") or ()  # a completion's
    for tops in found.get("top_logprobs") or ():
        choice.tops.append({_id(token): number for token, number in (tops or {}).items()})


def _id(token: str) -> int:
    """Read a token as ``return_tokens_as_token_ids`` writes it."""
    return int(token.removeprefix("token_id:"))

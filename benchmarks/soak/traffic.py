"""The deck of a round: what clients ask in it, drawn with a seed."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.soak.asks import Ask
from benchmarks.soak.client import ADAPTER

METHODS = (
    "cake", "dynamickv", "h2o", "keydiff", "knorm", "none", "pyramidkv", "random", "snapkv",
    "streamingllm", "tova", "uniform",
)  # fmt: skip
LENGTHS = (1, 5, 32, 64, 97, 128, 256, 257, 300, 420, 511, 513, 700, 1000, 1400)
ANSWERS = (1, 2, 8, 24, 60, 120)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kin": {"type": "array", "items": {"enum": ["aunt", "cousin"]}, "maxItems": 2},
    },
    "required": ["name", "age", "kin"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look up who somebody is.",
            "parameters": {
                "type": "object",
                "properties": {"who": {"type": "string", "maxLength": 10}},
                "required": ["who"],
                "additionalProperties": False,
            },
        },
    }
]
WRONG = (
    {"kv_compression": "zip"},
    {"kv_compression_budget": 4096},
    {"kv_compression_budget": 1.5},
    {"kv_compression_budget": 33},
    {"kv_compression_config": "gamma"},
    {"kv_compression_config": '{"no_such": 1}'},
    {"kv_compression_keep": [9, 0]},
    {"kv_compression_bugdet": 64},
)
"""Settings that a server must answer with a 400."""


@dataclass(frozen=True)
class Talk:
    """A conversation, or a single request.

    Attributes:
        ask: The first request; for a chat, without what the turns add.
        turns: What the user says, turn by turn; empty for a completion.

    """

    ask: Ask
    turns: tuple[str, ...] = ()

    def request(self, said: Sequence[str]) -> Ask:
        """Return the request of a turn.

        Args:
            said: What the model has said in the turns before it.

        """
        if not self.turns:
            return self.ask
        messages = list(self.ask.body["messages"])
        for turn, answer in zip(self.turns, said, strict=False):
            messages += [
                {"role": "user", "content": turn},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": self.turns[len(said)]})
        return replace(self.ask, body={**self.ask.body, "messages": messages})


class Dealer:
    """Draws talks.

    Args:
        text: Prose to ask about.
        tokens: The same as tokens of the model.
        compression: Whether requests may carry settings of compression.
        shares: Whether a budget may be a share of the prompt: not where the server streams prompts.
        seeds: Whether there are sampled requests with seeds.
        adapter: Whether the server has a LoRA adapter.

    """

    def __init__(
        self,
        text: str,
        tokens: Sequence[int],
        *,
        compression: bool,
        shares: bool,
        seeds: bool,
        adapter: bool,
    ) -> None:
        self._words = text.split()
        self._tokens = list(tokens)
        self._seeds = seeds
        self._shares = (0.25, 0.5) if shares else ()
        kinds: list[Callable[[random.Random], Talk]] = [
            self._completion, self._completion, self._document, self._document, self._chat,
            self._chat, self._tools, self._schema, self._choice, self._several, self._stop,
            self._penalties, self._batch, self._long_answer, self._long_answer, self._long_answer,
        ]  # fmt: skip
        if compression:
            kinds += [self._settings] * 5 + [self._wrong]
        if seeds:
            kinds += [self._seeded] * 2
        # vLLM's CPU build does not serve the two beside each other, compressed or not.
        kinds += [self._adapter] * 2 if adapter else [self._prompt_logprobs]
        self._kinds = kinds

    def deal(self, dice: random.Random, count: int) -> list[Talk]:
        """Draw so many talks, each kind about as often as it is listed."""
        kinds: list[Callable[[random.Random], Talk]] = []
        while len(kinds) < count:
            kinds += dice.sample(self._kinds, len(self._kinds))
        return [kind(dice) for kind in kinds[:count]]

    # --- prompts ---------------------------------------------------------------------------------

    def _prose(self, dice: random.Random, words: int) -> str:
        start = dice.randrange(len(self._words) - words)
        return " ".join(self._words[start : start + words])

    def _prompt(self, dice: random.Random, length: int | None = None) -> list[int]:
        """Tokens of prose from anywhere, in pieces, so that there are more of them than of it."""
        if length is None:
            length = dice.choice(LENGTHS) + dice.choice([0, 0, 1, 17])
        prompt: list[int] = []
        while len(prompt) < length:
            start = dice.randrange(len(self._tokens) - 400)
            prompt += self._tokens[start : start + dice.randrange(50, 400)]
        return prompt[:length]

    def _answer(self, dice: random.Random) -> dict[str, Any]:
        body: dict[str, Any] = {"temperature": 0, "max_tokens": dice.choice(ANSWERS)}
        if dice.random() < 0.6:
            body["ignore_eos"] = True
        return body

    def _with_logprobs(self, dice: random.Random, body: dict[str, Any]) -> dict[str, Any]:
        chance = dice.random()
        if chance < 0.5:
            chat = "messages" in body
            body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
            body["return_tokens_as_token_ids"] = True
        return body

    def _text(self, kind: str, dice: random.Random, body: dict[str, Any], **more: Any) -> Talk:
        return Talk(Ask(kind, False, self._with_logprobs(dice, body), **more))

    def _talk(
        self,
        kind: str,
        dice: random.Random,
        body: dict[str, Any],
        turns: Sequence[str],
        **more: Any,
    ) -> Talk:
        return Talk(Ask(kind, True, self._with_logprobs(dice, body), **more), tuple(turns))

    def _system(self, dice: random.Random) -> list[dict[str, str]]:
        words = dice.choice([0, 40, 150])
        if not words:
            return []
        start = dice.choice([0, 700])
        text = " ".join(self._words[start : start + words])
        return [{"role": "system", "content": f"You are a clerk. {text}"}]

    # --- kinds -----------------------------------------------------------------------------------

    def _completion(self, dice: random.Random) -> Talk:
        return self._text("completion", dice, {"prompt": self._prompt(dice), **self._answer(dice)})

    def _long_answer(self, dice: random.Random) -> Talk:
        """A request that outgrows what it was admitted with, so that others are preempted."""
        body = {"prompt": self._prompt(dice, dice.choice([30, 200, 330])), "temperature": 0}
        body |= {"max_tokens": dice.choice([200, 300]), "ignore_eos": True}
        return self._text("long answer", dice, body)

    def _document(self, dice: random.Random) -> Talk:
        """A long text that others ask about too, and a question of its own."""
        start = dice.randrange(4) * 300
        length = dice.choice([300, 600, 900, 1200])
        prompt = self._tokens[start : start + length] + self._prompt(dice, dice.randrange(5, 60))
        return self._text("document", dice, {"prompt": prompt, **self._answer(dice)})

    def _chat(self, dice: random.Random) -> Talk:
        turns = [self._prose(dice, dice.choice([5, 60, 150])) for _ in range(dice.randrange(2, 5))]
        body = {"messages": self._system(dice), **self._answer(dice)}
        body["max_tokens"] = dice.choice([8, 24, 48])
        return self._talk("chat", dice, body, turns)

    def _tools(self, dice: random.Random) -> Talk:
        named = {"type": "function", "function": {"name": "look_up"}}
        body = {
            "messages": self._system(dice), "temperature": 0, "max_tokens": 40, "tools": TOOLS,
            "tool_choice": dice.choice(["none", "auto", "required", named]),
        }  # fmt: skip
        return self._talk("tools", dice, body, [self._prose(dice, dice.choice([20, 250]))])

    def _schema(self, dice: random.Random) -> Talk:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        body = {
            "messages": self._system(dice), "temperature": 0, "max_tokens": 80,
            "response_format": form,
        }  # fmt: skip
        turn = self._prose(dice, dice.choice([20, 250])) + " Answer as JSON."
        return self._talk("JSON schema", dice, body, [turn])

    def _choice(self, dice: random.Random) -> Talk:
        shape = dice.choice([{"choice": ["aunt", "cousin"]}, {"regex": "[a-z]{3,9} [0-9]{2}"}])
        body = {
            "prompt": self._prompt(dice), "temperature": 0, "max_tokens": 16,
            "structured_outputs": shape,
        }  # fmt: skip
        return self._text("structured", dice, body)

    def _several(self, dice: random.Random) -> Talk:
        body = {
            "prompt": self._prompt(dice), "temperature": 0.8, "n": dice.choice([2, 3]),
            "max_tokens": dice.choice([8, 24, 60]), "top_p": dice.choice([1.0, 0.9]),
        }  # fmt: skip
        if seeded := self._seeds and dice.random() < 0.7:
            body["seed"] = dice.randrange(1 << 31)
        return self._text("n > 1", dice, body, same_alone=seeded)

    def _seeded(self, dice: random.Random) -> Talk:
        body = {
            **self._answer(dice), "prompt": self._prompt(dice), "temperature": 1.0,
            "seed": dice.randrange(1 << 31),
        }  # fmt: skip
        return self._text("seeded", dice, body)

    def _stop(self, dice: random.Random) -> Talk:
        body = {
            "prompt": self._prompt(dice), **self._answer(dice), "max_tokens": 60,
            "stop": dice.choice([[" the"], [".", ","], ["e", "\n"]]),
            "include_stop_str_in_output": dice.random() < 0.3,
        }  # fmt: skip
        if dice.random() < 0.5:
            body["min_tokens"] = dice.choice([2, 20])
        return self._text("stop", dice, body)

    def _penalties(self, dice: random.Random) -> Talk:
        body = {"prompt": self._prompt(dice), **self._answer(dice)}
        body |= dice.choice(
            [
                {"presence_penalty": 1.0},
                {"frequency_penalty": 0.7, "repetition_penalty": 1.2},
                {"logit_bias": {str(dice.randrange(20, 4000)): 5.0}},
                {"bad_words": ["the", " and"]},
            ]
        )
        return self._text("penalties", dice, body)

    def _prompt_logprobs(self, dice: random.Random) -> Talk:
        body = {"prompt": self._prompt(dice), **self._answer(dice), "prompt_logprobs": 1}
        body["max_tokens"] = dice.choice([1, 8])
        return self._text("prompt_logprobs", dice, body)

    def _batch(self, dice: random.Random) -> Talk:
        prompts = [self._prompt(dice, length) for length in (30, dice.choice([300, 800]), 520)]
        body = {"prompt": prompts, "temperature": 0, "max_tokens": dice.choice([4, 16])}
        return self._text("batch", dice, body)

    def _adapter(self, dice: random.Random) -> Talk:
        body = {"model": ADAPTER, "prompt": self._prompt(dice), **self._answer(dice)}
        return self._text("adapter", dice, body)

    def _settings(self, dice: random.Random) -> Talk:
        """A request with settings of compression of its own."""
        prompt = self._prompt(dice, dice.choice(LENGTHS[5:]) + dice.randrange(20))
        asked: dict[str, Any] = {}
        if dice.random() < 0.7:
            asked["kv_compression"] = dice.choice(METHODS)
        method = asked.get("kv_compression", "cake")
        if method != "none" and dice.random() < 0.6:
            asked["kv_compression_budget"] = dice.choice(
                [96, 128, 160, 256, *(s for s in self._shares if 96 <= s * len(prompt) <= 256)]
            )
        if method in ("cake", "snapkv") and dice.random() < 0.4:
            asked["kv_compression_config"] = json.dumps({"window": dice.choice([8, 16, 33])})
        if method not in ("none", "random") and dice.random() < 0.4:
            start = dice.randrange(len(prompt) - 30)
            asked["kv_compression_keep"] = [0, 4, start, start + dice.randrange(1, 20)]
        # The server that streams prompts is the one that cuts while it generates.
        if method != "none" and not self._shares and dice.random() < 0.3:
            asked["kv_compression_decode"] = False
        body = {"prompt": prompt, **self._answer(dice), "vllm_xargs": asked}
        return self._text("own settings", dice, body)

    def _wrong(self, dice: random.Random) -> Talk:
        """A request that must be refused."""
        body: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "vllm_xargs": dice.choice(WRONG)}
        if dice.random() < 0.5:
            body["prompt"] = self._prompt(dice, 40)
            return Talk(Ask("refused", False, body, same_alone=False, refused=True))
        body["messages"] = []
        return Talk(Ask("refused", True, body, same_alone=False, refused=True), ("Who is Anne?",))

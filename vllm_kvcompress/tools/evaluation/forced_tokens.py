"""A logits processor that makes the engine produce given tokens, step by step.

vLLM's prompt log-probabilities come from the prefill, which sees the full cache. Here the engine
decodes, but has to choose the given token at each step, so that what it reads is the compressed
cache; the log-probabilities are those of the unchanged logits. With fewer tokens than the request
may produce, the rest is the model's own: a question that comes after the compression, and its
answer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_KEY = "eval_forced_tokens"
"""Entry of ``SamplingParams.extra_args``: the token ids."""


class ForcedTokens(AdapterLogitsProcessor):
    """Give to ``LLM(logits_processors=[ForcedTokens])``."""

    def is_argmax_invariant(self) -> bool:
        """See the base class."""
        return False

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """See the base class."""

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], Tensor], Tensor] | None:
        """See the base class; None for requests that choose for themselves."""
        tokens = (params.extra_args or {}).get(FORCED_KEY)
        if not tokens:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) < len(tokens):
                chosen = tokens[len(output_ids)]
                logits.fill_(float("-inf"))
                logits[chosen] = 0.0
            return logits

        return force

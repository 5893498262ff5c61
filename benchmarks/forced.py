"""Likelihood of a given continuation, token by token through the decode path of a real engine.

vLLM's prompt log-probabilities come from the prefill, which sees the full cache. Here the engine
decodes, but is made to choose the given token at each step; the log-probability is that of the
unchanged logits, so the compressed cache is what is measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

_KEY = "forced_tokens"


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
        tokens = (params.extra_args or {}).get(_KEY)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            chosen = tokens[min(len(output_ids), len(tokens) - 1)]
            logits.fill_(float("-inf"))
            logits[chosen] = 0.0
            return logits

        return force


def forcing(tokens: Sequence[int]) -> SamplingParams:
    """Sampling parameters under which a request produces just these tokens."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,
        extra_args={_KEY: list(tokens)},
    )


def nll(completion: Any, tokens: Sequence[int]) -> list[float]:
    """Negative log-likelihood in nats of each forced token.

    Raises:
        ValueError: The completion is not the forced one.

    """
    if list(completion.token_ids) != list(tokens):
        raise ValueError("the engine did not produce the forced tokens")
    steps = completion.logprobs
    return [-steps[i][token].logprob for i, token in enumerate(tokens)]

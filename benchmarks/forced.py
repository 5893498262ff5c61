"""Likelihood of a given continuation, token by token through the decode path of a real engine.

vLLM's prompt log-probabilities come from the prefill, which sees the full cache. Here the engine
decodes, but is made to choose the given token at each step; the log-probability is that of the
unchanged logits, so the compressed cache is what is measured.
"""

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams

from vllm_kvcompress.tools.evaluation.forced_tokens import FORCED_KEY, ForcedTokens

__all__ = ["ForcedTokens", "forcing", "nll"]


def forcing(tokens: Sequence[int]) -> SamplingParams:
    """Sampling parameters under which a request produces just these tokens."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,
        extra_args={FORCED_KEY: list(tokens)},
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

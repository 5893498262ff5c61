"""Compares the answer from a crowd with the one to the same request alone."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.soak.asks import Answer, Choice

Verdict = Literal["equal", "near tie", "unlike"]


@dataclass(frozen=True)
class Bounds:
    """What rounding can do, in nats.

    Attributes:
        tie: Difference of the log-probabilities of two tokens, alone, up to which the one may come
            in place of the other.
        drift: Difference of the log-probability of one token between crowd and alone.

    """

    tie: float
    drift: float


@dataclass(frozen=True)
class Comparison:
    """How alike two answers are.

    Attributes:
        verdict: What they count as.
        reason: In words; empty for equal ones.
        drift: Largest difference of a token's log-probability, in nats, up to where they part.

    """

    verdict: Verdict
    reason: str = ""
    drift: float = 0.0


def compare(
    crowd: Answer, alone: Answer, bounds: Bounds, *, sampled: bool, parsed: bool
) -> Comparison:
    """Compare two whole answers.

    Args:
        crowd: From the crowd, with or without log-probabilities.
        alone: To the same request alone, with log-probabilities.
        bounds: What rounding can do.
        sampled: Whether tokens were drawn, with a seed: then there are no near ties.
        parsed: Whether the server looked for calls of tools, which vLLM finds in other places when
            it streams: then only tokens are compared, not what was made of them.

    """
    worst = Comparison("equal")
    if crowd.choices.keys() != alone.choices.keys():
        return Comparison("unlike", "other choices")
    if crowd.prompt_tokens != alone.prompt_tokens:
        return Comparison(
            "unlike", f"{crowd.prompt_tokens} and {alone.prompt_tokens} prompt tokens"
        )
    order = ("equal", "near tie", "unlike")
    drift = _largest(crowd.prompt_logprobs, alone.prompt_logprobs)
    if drift > bounds.drift:
        return Comparison("unlike", f"prompt log-probabilities differ by {drift:.4f}", drift)
    for index, choice in crowd.choices.items():
        found = _compare(choice, alone.choices[index], bounds, sampled, parsed)
        drift = max(drift, found.drift)
        if order.index(found.verdict) > order.index(worst.verdict):
            worst = found
    return Comparison(worst.verdict, worst.reason, drift)


def _compare(
    crowd: Choice, alone: Choice, bounds: Bounds, sampled: bool, parsed: bool
) -> Comparison:
    pairs = list(zip(crowd.tokens, alone.tokens, strict=False))
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    drift = _largest(crowd.logprobs[:common], alone.logprobs[:common])
    if drift > bounds.drift:
        return Comparison("unlike", f"log-probabilities differ by {drift:.4f}", drift)
    if common == len(crowd.tokens) == len(alone.tokens):
        if not parsed and (crowd.finish, crowd.text) != (alone.finish, alone.text):
            return Comparison("unlike", "same tokens, other text or end", drift)
        return Comparison("equal", "", drift)
    if common == len(pairs):
        ended = f"{len(crowd.tokens)} and {len(alone.tokens)} tokens, alike up to the shorter's end"
        return Comparison("unlike", ended, drift)
    one, other = pairs[common]
    margin = _margin(alone, common, one)
    reason = f"token {common} is {one}, alone {other}: {margin:.4f} nats apart"
    tie = margin <= bounds.tie and not sampled
    return Comparison("near tie" if tie else "unlike", reason, drift)


def _margin(alone: Choice, place: int, token: int) -> float:
    """Return by how much the token alone is likelier than another; at least that, for rare ones."""
    tops = alone.tops[place]
    mine = alone.logprobs[place]
    return mine - tops.get(token, min(tops.values()))


def _largest(some: list[float], others: list[float]) -> float:
    pairs = zip(some, others, strict=False)
    return max((abs(one - other) for one, other in pairs), default=0.0)

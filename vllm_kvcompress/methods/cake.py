"""CAKE (arXiv 2503.12491): budgets by how spread out and how changeable a layer's attention is.

Differences from the released code (cakekv) unless ``faithful``: all statistics in fp32, P in the
log domain (no underflow), budgets that spend the pool exactly and do not depend on the cascade, no
eviction while decoding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vllm_kvcompress.methods import released_cake
from vllm_kvcompress.methods.checks import check_int, check_number, check_odd
from vllm_kvcompress.methods.layer import LayerInput, LayerScores
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Allocator, Inseparable, Scorer
from vllm_kvcompress.methods.reads import (
    WINDOW_NEEDS,
    log,
    once_per_layer,
    queries_and_keys,
    window_scalars,
    window_votes,
)
from vllm_kvcompress.methods.released_attention import window_attention

# Weights are below 2 and, unless zero, at least 2 ** -_DEEPEST: inside the normal fp64 range.
_DEEPEST = 1000


@dataclass(frozen=True, kw_only=True)
class CakeScorer(Scorer):
    """A token is worth the mean plus ``gamma`` times the variance of the attention it receives.

    Both are taken over the last queries, average-pooled along tokens, then averaged over the heads
    of a KV group.

    Attributes:
        gamma: Weight of the variance, at least 0.
        kernel: Width of the pooling, odd.

    """

    needs = WINDOW_NEEDS
    least_window = 2  # for a variance
    uses_window_statistics = True

    gamma: float = 200.0
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0)
        check_odd("kernel", self.kernel)

    def score(self, layer: LayerInput) -> Tensor:
        return window_votes(layer, kernel=self.kernel, gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class CakeAllocator(Allocator):
    """Layers share the pool in proportion to their preference P = H^(1/tau1) * V^(1/tau2).

    H is the entropy of the attention that the last queries pay to the history, V the sum over
    tokens of its variance between those queries.

    Attributes:
        temperatures_by_default: Of Qwen2.5-7B-Instruct in model2tau.json (cakekv), the authors'
            own; docs/results.md has what they are worth.
        tau1: Temperature of the dispersion H, above 0; None: the default.
        tau2: Temperature of the shift V, above 0; None: the default.
        every: Layers between two cuts; 0 cuts only after the last layer. The budgets do not depend
            on it, only when memory is freed.

    """

    needs = WINDOW_NEEDS
    least_window = 2
    uses_window_statistics = True
    ratios_are_fixed = True
    temperatures_by_default: ClassVar[tuple[float, float]] = (1.5, 0.6)

    tau1: float | None = None
    tau2: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau1", self.tau1, 0, above=True, optional=True)
        check_number("tau2", self.tau2, 0, above=True, optional=True)
        check_int("every", self.every, 0)

    @property
    def temperatures(self) -> tuple[float, float]:
        """tau1 and tau2 as they are used."""
        tau1, tau2 = self.temperatures_by_default
        return (
            tau1 if self.tau1 is None else self.tau1,
            tau2 if self.tau2 is None else self.tau2,
        )

    @property
    def layers_per_division(self) -> int:
        return self.every

    def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        """Return ``log_entropy`` and ``log_shift``, natural logarithms; -inf for zero."""
        entropy, shift = window_scalars(layer)
        return {"log_entropy": entropy, "log_shift": shift}

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        tau1, tau2 = self.temperatures
        log2_p = np.array(
            [
                (s.stat("log_entropy") / tau1 + s.stat("log_shift") / tau2) / math.log(2.0)
                for s in seen
            ]
        )
        return _exp2_scaled(log2_p)


@dataclass(frozen=True, kw_only=True)
class FaithfulCake(CakeScorer, CakeAllocator, Inseparable):
    """The release: statistics in the model's dtype and integer budgets, with their known losses.

    The pool's division then only rounds those to what the arena can hold. Tokens lie by score, and
    cuts while generating are the release's: one token out for each that comes in, by the attention
    of that one query, pooled in storage order.

    Attributes:
        temperatures_by_default: What the release takes for a model that it has no pair for.

    """

    uses_window_statistics = False
    ratios_are_fixed = False
    stores_by_worth = True
    token_by_token = True
    temperatures_by_default = (1.0, 1.0)

    def score(self, layer: LayerInput) -> Tensor:
        attention = _released_attention(layer)
        if attention.shape[2] == 1:
            scores = released_cake.step_indicator(attention, self.kernel, layer.num_kv_heads)
        else:
            scores = released_cake.indicator(attention, self.gamma, self.kernel, layer.num_kv_heads)
        return scores[0].float()

    def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        """Return H and V as logarithms and P; nothing at a cut while generating."""
        attention = _released_attention(layer)
        if attention.shape[2] == 1:
            return {}
        dispersion, shift, preference = released_cake.preference(attention, *self.temperatures)
        return {
            "log_entropy": log(dispersion),
            "log_shift": log(shift),
            "preference": preference,
        }

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        preferences = [s.stat("preference") for s in seen]
        # The released code stops with an error where the fp32 sum is 0, infinite or no number.
        if not 0.0 < sum(preferences) <= float(np.finfo(np.float32).max):
            return np.zeros(len(seen))
        history = seen[0].tokens.shape[-1]
        budgets = released_cake.layer_budgets(preferences, base * num_layers, history)
        return np.array(budgets.clipped, dtype=np.float64)


Cake = MethodSpec(name="cake", scorer=CakeScorer, allocator=CakeAllocator, faithful=FaithfulCake)


@once_per_layer
def _released_attention(layer: LayerInput) -> Tensor:
    """Attention [1, H, m, S'] of the last m queries on the history, in the model's dtype."""
    queries, keys = queries_and_keys(layer)
    probabilities = window_attention(
        queries[None], keys[None], scale=layer.scale, soft_cap=layer.soft_cap, sinks=layer.sinks
    )
    return probabilities[..., : layer.history]


def _exp2_scaled(log2_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """2 ** x for every x, times a power of two that brings the largest to the order of 1.

    The fraction of a layer's exponent is exponentiated on its own, so that its mantissa does not
    change when a layer with a larger x joins: ranks of seats stay what they were, and with them
    the equality of cascade and one-shot.
    """
    finite = np.isfinite(log2_values)
    if not finite.any():
        return np.zeros_like(log2_values)
    whole = np.floor(np.where(finite, log2_values, 0.0))
    mantissa = np.exp2(np.where(finite, log2_values - whole, -np.inf))
    powers = np.maximum(whole - whole[finite].max(), -_DEEPEST)
    return np.ldexp(mantissa, powers.astype(np.int64))

"""CAKE: budgets by how spread out and how restless a layer's attention is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics
from kvcompress_kernels.selection import token_scores
from vllm_kvcompress.methods import released_cake
from vllm_kvcompress.methods.base import END, Every, LayerInput, LayerScores, Method, Need, Schedule
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.released_attention import window_attention
from vllm_kvcompress.methods.window import WINDOW_NEEDS, observe, observed

# Weights are below 2 and, unless zero, at least 2 ** -_DEEPEST: inside the normal fp64 range.
_DEEPEST = 1000

TEMPERATURES = (1.5, 0.6)
"""Of Qwen2.5-7B-Instruct in model2tau.json (cakekv); docs/results.md has what they are worth."""
RELEASED_TEMPERATURES = (1.0, 1.0)
"""What the release takes for a model that is not in that file."""


@register
@dataclass(frozen=True, kw_only=True)
class Cake(Method):
    """CAKE (arXiv 2503.12491).

    A layer's preference is P = H^(1/tau1) * V^(1/tau2): H is the entropy of the attention the last
    queries pay to the history, V the sum over tokens of its variance between those queries. Layers
    share the pool in proportion to P. A token is worth the mean plus ``gamma`` times the variance
    of the attention it receives, average-pooled along tokens, mean over the heads of a KV group.

    ``window``: protected tokens, and the queries that are looked at; at least 2 (a variance).
    ``tau1``, ``tau2``: temperatures above 0 on dispersion and shift; None takes those that the
    authors tuned for Qwen2.5-7B, with ``faithful`` the release's 1 for models it does not know.
    ``gamma``: weight of the variance, at least 0. ``kernel``: width of the pooling, odd.
    ``every``: layers between two cuts; 0 cuts only after the last layer. The budgets do not depend
    on it, only when memory is freed.
    ``faithful``: statistics in the model's dtype and the released integer budgets, with their
    known losses; the allocator then only rounds those to what the arena can hold. Tokens lie by
    score, and cuts while generating are the release's: one token out for each that comes in, by the
    attention of that one query, pooled in storage order.

    Differences from the released code (cakekv) unless ``faithful``: all statistics in fp32, P in
    the log domain (no underflow), budgets that spend the pool exactly and do not depend on the
    cascade, no eviction while decoding.
    """

    name: ClassVar[str] = "cake"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS
    scorer_params: ClassVar[frozenset[str]] = frozenset({"gamma", "kernel"})
    allocator_params: ClassVar[frozenset[str]] = frozenset({"tau1", "tau2", "every"})
    allocator_needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS

    tau1: float | None = None
    tau2: float | None = None
    gamma: float = 200.0
    kernel: int = 5
    every: int = 1
    faithful: bool = False

    def __post_init__(self) -> None:
        self._check_int("window", 2)
        self._check_number("tau1", 0, above=True, optional=True)
        self._check_number("tau2", 0, above=True, optional=True)
        self._check_number("gamma", 0)
        self._check_odd("kernel")
        self._check_int("every", 0)
        self._check_bool("faithful")

    @property
    def temperatures(self) -> tuple[float, float]:
        """tau1 and tau2 as they are used."""
        tau1, tau2 = RELEASED_TEMPERATURES if self.faithful else TEMPERATURES
        return (
            tau1 if self.tau1 is None else self.tau1,
            tau2 if self.tau2 is None else self.tau2,
        )

    @property
    def ratios_are_fixed(self) -> bool:
        return not self.faithful

    @property
    def composable(self) -> bool:
        return not self.faithful

    @property
    def uses_window_statistics(self) -> bool:
        return not self.faithful

    @property
    def token_by_token(self) -> bool:
        return self.faithful

    @property
    def stores_by_worth(self) -> bool:
        return self.faithful

    @property
    def schedule(self) -> Schedule:
        return Every(self.every) if self.every else END

    def score(self, layer: LayerInput) -> LayerScores:
        if self.faithful:
            return self._released_score(layer)
        stats = observe(layer, self.window, self.name)
        return LayerScores(
            tokens=token_scores(
                stats.mean,
                stats.var,
                gamma=self.gamma,
                kernel=self.kernel,
                mode="avg",
                num_kv_heads=layer.num_kv_heads,
            ),
            stats=_logs(stats),
        )

    def layer_stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        if self.faithful:
            return self._released_score(layer).stats
        return _logs(observe(layer, self.window, self.name))

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        if self.faithful:
            return self._released_weights(seen, base, num_layers)
        tau1, tau2 = self.temperatures
        log2_p = np.array(
            [
                (s.stat("log_entropy") / tau1 + s.stat("log_shift") / tau2) / math.log(2.0)
                for s in seen
            ]
        )
        return _exp2_scaled(log2_p)

    def _released_score(self, layer: LayerInput) -> LayerScores:
        queries, keys = observed(layer, self.name)
        probabilities = window_attention(
            queries[None], keys[None], scale=layer.scale, soft_cap=layer.soft_cap, sinks=layer.sinks
        )
        history = probabilities[..., : layer.num_tokens - self.window]
        if queries.shape[1] == 1:
            return LayerScores(
                released_cake.step_indicator(history, self.kernel, layer.num_kv_heads)[0].float()
            )
        dispersion, shift, preference = released_cake.preference(history, *self.temperatures)
        scores = released_cake.indicator(history, self.gamma, self.kernel, layer.num_kv_heads)
        return LayerScores(
            tokens=scores[0].float(),
            stats={
                "log_entropy": _log(dispersion),
                "log_shift": _log(shift),
                "preference": preference,
            },
        )

    def _released_weights(
        self, seen: Sequence[LayerScores], base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        preferences = [s.stat("preference") for s in seen]
        # The released code stops with an error where the fp32 sum is 0, infinite or no number.
        if not 0.0 < sum(preferences) <= float(np.finfo(np.float32).max):
            return np.zeros(len(seen))
        history = seen[0].tokens.shape[-1]
        budgets = released_cake.layer_budgets(preferences, base * num_layers, history)
        return np.array(budgets.clipped, dtype=np.float64)


def _logs(stats: WindowStatistics) -> dict[str, float | Tensor]:
    return {"log_entropy": _log(stats.entropy), "log_shift": _log(stats.shift)}


def _log(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0.0 else -math.inf


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

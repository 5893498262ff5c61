"""SnapKV's token scores with the same budget in every layer: the baseline to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompress_kernels.selection import token_scores

from .base import LayerInput, LayerScores, Method, Need
from .registry import register
from .window import WINDOW_NEEDS, observe


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Equal budgets, tokens by the mean attention they receive from the last queries.

    ``window``: protected tokens, and the queries that vote. ``kernel``: width of the average
    pooling along tokens, odd. Heads of a KV group vote by their mean, as in CAKE, so that a
    comparison with CAKE shows the effect of layer budgets and the variance term and nothing else.

    Source: SnapKV (arXiv 2404.14469), in the per-KV-head form of kvpress.
    """

    name: ClassVar[str] = "uniform"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS
    local: ClassVar[bool] = True

    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_odd("kernel")

    @property
    def observes(self) -> bool:
        return True

    def score(self, layer: LayerInput) -> LayerScores:
        mean = observe(layer, self.window, self.name).mean
        return LayerScores(
            token_scores(
                mean,
                None,
                gamma=0.0,
                kernel=self.kernel,
                mode="avg",
                num_kv_heads=layer.num_kv_heads,
            )
        )

    def cap(self, history: int, base: int) -> int:
        """No layer ever needs more than its equal share."""
        return min(history, base)

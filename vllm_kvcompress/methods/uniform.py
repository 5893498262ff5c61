"""CAKE's scores without its variance, and equal budgets: the neutral baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.window import WINDOW_NEEDS, window_votes


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(EqualShares):
    """Equal budgets, tokens by the mean attention they receive from the last queries.

    ``window``: protected tokens, and the queries that vote. ``kernel``: width of the average
    pooling along tokens, odd. Heads of a KV group vote by their mean, as in CAKE, so that a
    comparison with CAKE shows the effect of layer budgets and the variance term and nothing else.

    Source: SnapKV (arXiv 2404.14469), in the per-KV-head form of kvpress; ``snapkv`` with its
    default parameters scores alike.
    """

    name: ClassVar[str] = "uniform"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS
    scorer_params: ClassVar[frozenset[str]] = frozenset({"kernel"})

    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_odd("kernel")

    @property
    def uses_window_statistics(self) -> bool:
        return True

    def score(self, layer: LayerInput) -> LayerScores:
        return LayerScores(window_votes(layer, self.window, self.name, kernel=self.kernel))

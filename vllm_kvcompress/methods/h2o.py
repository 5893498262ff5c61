"""H2O on the observation window: heavy hitters among the tokens, without pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.window import WINDOW_NEEDS, window_votes


@register
@dataclass(frozen=True, kw_only=True)
class H2O(EqualShares):
    """H2O (arXiv 2306.14048), with the queries of the window instead of all.

    A token is worth the attention it receives, summed over queries (here: their mean, which ranks
    alike) and averaged over the heads of a KV group, without pooling along tokens. Every layer
    keeps equally many.

    ``window``: protected tokens, and the queries that vote.

    The paper sums over every query of the prompt, for which all of them would have to be collected
    and S x S probabilities computed; a longer ``window`` comes closer.
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS

    @property
    def uses_window_statistics(self) -> bool:
        return True

    def score(self, layer: LayerInput) -> LayerScores:
        return LayerScores(window_votes(layer, self.window, self.name, kernel=1))

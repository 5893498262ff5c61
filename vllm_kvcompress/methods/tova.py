"""TOVA: the tokens that the very last query looks at, the same for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.window import WINDOW_NEEDS, observe


@register
@dataclass(frozen=True, kw_only=True)
class Tova(EqualShares):
    """TOVA (arXiv 2401.06104).

    A token is worth the attention it receives from the last query, averaged over all query heads
    of the layer, so that all KV heads keep the same tokens. Every layer keeps equally many.

    ``window``: protected tokens. Beyond 1 it protects more, and the last query alone still judges.

    Differences from the paper: the last token is always kept, and a prompt is cut once at its end
    instead of token by token while it is read and while the model answers.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS

    window: int = 1

    @property
    def uses_window_statistics(self) -> bool:
        # Statistics of a longer window do not tell its last query from the others.
        return self.window == 1

    def score(self, layer: LayerInput) -> LayerScores:
        last = observe(layer, self.window, self.name, last_query_only=True).mean
        return LayerScores(last.mean(dim=0).repeat(layer.num_kv_heads, 1))

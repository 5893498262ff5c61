"""SnapKV: the tokens that the prompt's last queries look at, with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.window import WINDOW_NEEDS, window_votes


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(EqualShares):
    """SnapKV (arXiv 2404.14469).

    A token is worth the attention it receives from the last queries, pooled along tokens so that
    it brings its neighbours, and reduced to KV heads. Every layer keeps equally many.

    ``window``: protected tokens, and the queries that vote. ``kernel``: width of the pooling, odd.
    ``pooling``: "avg" or "max". ``reduce``: how the query heads of a KV group vote, "mean" or
    "max".

    Differences from the released code (SnapKV snapkv_utils.py): one choice per KV head instead of
    one per query head on an expanded cache, the mean over queries instead of the sum (the same
    ranking), fp32, ties to the lower id.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS
    scorer_params: ClassVar[frozenset[str]] = frozenset({"kernel", "pooling", "reduce"})

    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_odd("kernel")
        self._check_choice("pooling", ("avg", "max"))
        self._check_choice("reduce", ("mean", "max"))

    @property
    def uses_window_statistics(self) -> bool:
        return True

    def score(self, layer: LayerInput) -> LayerScores:
        return LayerScores(
            window_votes(
                layer,
                self.window,
                self.name,
                kernel=self.kernel,
                pooling=self.pooling,
                reduce=self.reduce,
            )
        )

"""DynamicKV: budgets by how many of the model's best tokens a layer holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcompress_kernels.selection import group_mean, grouped, winners_per_layer
from vllm_kvcompress.methods import released_dynamickv
from vllm_kvcompress.methods.base import Every, LayerInput, LayerScores, Method, Need, Schedule
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.window import WINDOW_NEEDS, observed, window_votes


@register
@dataclass(frozen=True, kw_only=True)
class DynamicKV(Method):
    """DynamicKV (arXiv 2412.14838).

    A token is worth the attention it receives from the last queries, summed, pooled along tokens
    and reduced to KV heads. Every ``every`` layers, and after the last, the best entries of all
    layers seen are counted, as many as the budget of those layers, and the pool is shared in
    proportion to the counts. No layer keeps more than ``r_max`` times the average.

    Attention that is spread evenly and attention that goes to a few tokens do not compare as they
    are: of raw mass, a flat layer has many middling entries that beat all but the few best of a
    sharp one, and takes its pages although none of its tokens stands out. So an entry counts by how
    far it stands out of the background of its layer and KV head: the entry that a share
    ``background`` of them does not exceed.

    ``window``: protected tokens, and the queries that are looked at; the default 32 is that of the
    other methods here, for fair comparison (the authors' scripts use 8 for this method and 32 for
    most of its rivals). ``kernel``: width of the pooling, odd. ``pooling``: "avg" or "max".
    ``reduce``: how the query heads of a KV group vote, "mean" or "max". ``r_max``: at least 1, in
    units of the average history budget. ``every``: layers between two cuts, at least 1.
    ``min_tokens``: history tokens each layer is given first. ``compare``: how entries of different
    layers are compared, against the "background" as said above or by "mass" as published.
    ``background``: above 0 and below 1. With 0.5, the median, layers share equally at a budget of
    half of the history, as half of every layer lies above it. ``faithful``: scores in the model's
    dtype, compared by mass, and the released integer budgets, counted per query head, with their
    known bias towards the last layer; the cache still holds KV heads, not one copy per query head
    as in the release.

    Differences from the released code (DynamicKV, dynamic_v11) unless ``faithful``: KV heads
    instead of query heads, entries compared with their layer's background, exact proportional
    division, always a cut after the last layer, no token twice, ties to the lower id.
    """

    name: ClassVar[str] = "dynamickv"
    needs: ClassVar[frozenset[Need]] = WINDOW_NEEDS
    scorer_params: ClassVar[frozenset[str]] = frozenset({"kernel", "pooling", "reduce"})
    allocator_params: ClassVar[frozenset[str]] = frozenset(
        {"r_max", "every", "min_tokens", "compare", "background"}
    )

    kernel: int = 7
    pooling: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"
    r_max: float = 10.0
    every: int = 4
    min_tokens: int = 0
    compare: Literal["background", "mass"] = "background"
    background: float = 0.1
    faithful: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_odd("kernel")
        self._check_choice("pooling", ("avg", "max"))
        self._check_choice("reduce", ("mean", "max"))
        self._check_number("r_max", 1)
        self._check_int("every", 1)
        self._check_int("min_tokens", 0)
        self._check_choice("compare", ("background", "mass"))
        self._check_share("background")
        self._check_bool("faithful")

    @property
    def composable(self) -> bool:
        return not self.faithful

    @property
    def uses_window_statistics(self) -> bool:
        return not self.faithful

    @property
    def schedule(self) -> Schedule:
        return Every(self.every)

    def score(self, layer: LayerInput) -> LayerScores:
        if self.faithful:
            queries, keys = observed(layer, self.name)
            per_head = released_dynamickv.window_scores(
                queries[None],
                keys[None],
                history=layer.num_tokens - self.window,
                kernel=self.kernel,
                pooling=self.pooling,
                scale=layer.scale,
                soft_cap=layer.soft_cap,
                sinks=layer.sinks,
            )[0].float()
        else:
            return LayerScores(self._window_sum(layer))
        if self.reduce == "mean":
            tokens = group_mean(per_head, layer.num_kv_heads)
        else:
            tokens = grouped(per_head, layer.num_kv_heads).amax(dim=1)
        return LayerScores(tokens, query_heads=per_head)

    def _window_sum(self, layer: LayerInput) -> Tensor:
        pooled = window_votes(
            layer,
            self.window,
            self.name,
            kernel=self.kernel,
            pooling=self.pooling,
            reduce=self.reduce,
        )
        # The statistics are means over the window's queries; this method is defined on their sum.
        return pooled * (self.window if layer.queries is None else layer.queries.shape[1])

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        if self.faithful:
            return self._released_weights(seen, base, num_layers)
        scores = [s.tokens for s in seen]
        if self.compare == "background":
            scores = [_out_of_background(s, self.background) for s in scores]
        heads = scores[0].shape[0]
        return winners_per_layer(scores, base * heads * len(seen)).astype(np.float64)

    def cap(self, history: int, base: int) -> int:
        return min(history, int(self.r_max * base))

    def floor(self, history: int, base: int) -> int:
        return min(self.min_tokens, history)

    def _released_weights(
        self, seen: Sequence[LayerScores], base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        scores = [s.tokens if s.query_heads is None else s.query_heads for s in seen]
        budgets = released_dynamickv.layer_budgets(
            [score[None] for score in scores], base=base, r_max=self.r_max, num_layers=num_layers
        )
        return np.maximum(np.array(budgets, dtype=np.float64), 0.0)


LEAST_BACKGROUND = 1e-6
"""Of a row's mean magnitude: a background below it says that most entries are nothing."""


def _out_of_background(scores: Tensor, share: float) -> Tensor:
    """How far each of [N, S'] is above the background of its row, in backgrounds; fp32, new.

    Rows keep their order whatever the sign of their scores, which other methods may have given.
    """
    scores = scores.float()
    rank = math.ceil(share * scores.shape[1])
    background = scores.kthvalue(rank, dim=1, keepdim=True).values
    least = LEAST_BACKGROUND * scores.abs().mean(dim=1, keepdim=True)
    unit = torch.maximum(background.abs(), least).clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores - background) / unit

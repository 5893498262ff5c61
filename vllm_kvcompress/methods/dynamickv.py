"""DynamicKV (arXiv 2412.14838): budgets by how many of the model's best tokens a layer holds.

Differences from the released code (DynamicKV, dynamic_v11) unless ``faithful``: KV heads instead of
query heads, entries compared with their layer's background, exact proportional division, always a
cut after the last layer, no token twice, ties to the lower id.

The default ``window`` of 32 is that of the other methods here, for fair comparison; the authors'
scripts use 8 for this method and 32 for most of its rivals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcompress_kernels.dispatch import use_triton
from kvcompress_kernels.selection import grouped
from kvcompress_kernels.winners import (
    Stage,
    out_of_background,
    winners_by_stage,
    winners_per_layer,
)
from vllm_kvcompress.methods import released_dynamickv
from vllm_kvcompress.methods.checks import check_choice, check_int, check_number, check_share
from vllm_kvcompress.methods.layer import LayerInput, LayerScores
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Allocator, Inseparable, StagedDivision
from vllm_kvcompress.methods.reads import once_per_layer, queries_and_keys
from vllm_kvcompress.methods.snapkv import SnapKVScorer


@dataclass(frozen=True, kw_only=True)
class DynamicKVScorer(SnapKVScorer):
    """SnapKV's scores, as sums over the window's queries where SnapKV has means.

    Attributes:
        kernel: Width of the pooling, odd.

    """

    kernel: int = 7

    def score(self, layer: LayerInput) -> Tensor:
        queries = self.window if layer.queries is None else layer.queries.shape[1]
        return self.votes(layer, times=queries)


@dataclass(frozen=True, kw_only=True)
class DynamicKVAllocator(Allocator):
    """Layers share the pool in proportion to how many of the best entries they hold.

    Every ``every`` layers, and after the last, the best entries of all layers seen are counted, as
    many as the budget of those layers.

    Attention that is spread evenly and attention that goes to a few tokens do not compare as they
    are: of raw mass, a flat layer has many middling entries that beat all but the few best of a
    sharp one, and takes its pages although none of its tokens stands out. So an entry counts by how
    far it stands out of the background of its layer and KV head: the entry that a share
    ``background`` of them does not exceed.

    Attributes:
        r_max: No layer keeps more than this many times the average history budget; at least 1.
        every: Layers between two cuts, at least 1.
        min_tokens: History tokens each layer is given first; where the budget has no room for
            as many, all layers get the same.
        compare: How entries of different layers are compared: against the "background", or by
            "mass" as published.
        background: Above 0 and below 1; not with "mass". With 0.5, the median, layers share equally
            at a budget of half of the history, as half of every layer lies above it.

    """

    r_max: float = 10.0
    every: int = 4
    min_tokens: int = 0
    compare: Literal["background", "mass"] = "background"
    background: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("r_max", self.r_max, 1)
        check_int("every", self.every, 1)
        check_int("min_tokens", self.min_tokens, 0)
        check_choice("compare", self.compare, ("background", "mass"))
        check_share("background", self.background)

    def idle(self) -> Mapping[str, str]:
        return {} if self.compare == "background" else {"background": 'compare is "mass"'}

    @property
    def layers_per_division(self) -> int:
        return self.every

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        if use_triton(seen[0].tokens, "auto"):
            ((counts,),) = self._count([StagedDivision(seen, [len(seen)], base)])
            return counts
        if self.compare == "background":
            scores = [_standing_out(s, self.background) for s in seen]
        else:
            scores = [s.tokens for s in seen]
        heads = scores[0].shape[0]
        return winners_per_layer(scores, base * heads * len(seen)).astype(np.float64)

    def weights_by_stage(
        self, divisions: Sequence[StagedDivision], *, num_layers: int
    ) -> list[list[npt.NDArray[np.float64]]]:
        own = type(self).weights is DynamicKVAllocator.weights
        if own and use_triton(divisions[0].layers[0].tokens, "auto"):
            return self._count(divisions)
        return super().weights_by_stage(divisions, num_layers=num_layers)

    def _count(self, divisions: Sequence[StagedDivision]) -> list[list[npt.NDArray[np.float64]]]:
        """All stages of all requests from one set of histograms, with one wait for the device."""
        stages, first = [], 0
        for division in divisions:
            per_layer = division.base * division.layers[0].tokens.shape[0]
            stages += [Stage(first, first + n, per_layer * n) for n in division.stages]
            first += len(division.layers)
        counts = winners_by_stage(
            [layer.tokens for division in divisions for layer in division.layers],
            stages,
            background=self.background if self.compare == "background" else None,
        )
        found = iter(counts)
        return [[next(found).astype(np.float64) for _ in division.stages] for division in divisions]

    def cap(self, history: int, base: int) -> int:
        return min(history, int(self.r_max * base))

    def floor(self, history: int, base: int) -> int:
        return min(self.min_tokens, history)


@dataclass(frozen=True, kw_only=True)
class FaithfulDynamicKV(DynamicKVScorer, DynamicKVAllocator, Inseparable):
    """The release: scores in the model's dtype, compared by mass, and its integer budgets.

    They are counted per query head, with their known bias towards the last layer. The cache still
    holds KV heads, not one copy per query head as in the release.
    """

    uses_window_statistics = False

    def idle(self) -> Mapping[str, str]:
        return dict.fromkeys(("compare", "background"), "faithful compares by mass")

    def score(self, layer: LayerInput) -> Tensor:
        per_head = _released_scores(layer, self.kernel, self.pooling)
        groups = grouped(per_head, layer.num_kv_heads)
        return groups.mean(dim=1) if self.reduce == "mean" else groups.amax(dim=1)

    def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        """Return ``query_heads``, the scores of every query head, fp32 [H, S']."""
        return {"query_heads": _released_scores(layer, self.kernel, self.pooling)}

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        scores = [torch.as_tensor(s.stats["query_heads"])[None] for s in seen]
        budgets = released_dynamickv.layer_budgets(
            scores, base=base, r_max=self.r_max, num_layers=num_layers
        )
        return np.maximum(np.array(budgets, dtype=np.float64), 0.0)


DynamicKV = MethodSpec(
    name="dynamickv",
    scorer=DynamicKVScorer,
    allocator=DynamicKVAllocator,
    faithful=FaithfulDynamicKV,
)


@once_per_layer
def _released_scores(layer: LayerInput, kernel: int, pooling: Literal["avg", "max"]) -> Tensor:
    """Scores of every query head as in the release, fp32 [H, S']."""
    queries, keys = queries_and_keys(layer)
    return released_dynamickv.window_scores(
        queries[None],
        keys[None],
        history=layer.history,
        kernel=kernel,
        pooling=pooling,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        sinks=layer.sinks,
    )[0].float()


def _standing_out(scores: LayerScores, share: float) -> Tensor:
    """Entries of a layer compared with its background, computed when the first division asks."""
    key = ("out_of_background", share)
    if key not in scores.reads:
        scores.reads[key] = out_of_background(scores.tokens, share)
    found: Tensor = scores.reads[key]
    return found

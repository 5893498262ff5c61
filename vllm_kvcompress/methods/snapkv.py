"""SnapKV (arXiv 2404.14469): the tokens that the prompt's last queries look at, with neighbours.

Differences from the released code (SnapKV snapkv_utils.py): one choice per KV head instead of one
per query head on an expanded cache, the mean over queries instead of the sum (the same ranking),
fp32, ties to the lower id.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vllm_kvcompress.methods.checks import check_choice
from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.reads import window_votes
from vllm_kvcompress.methods.uniform import UniformScorer


@dataclass(frozen=True, kw_only=True)
class SnapKVScorer(UniformScorer):
    """A token is worth the attention that it and its neighbours receive from the last queries.

    Attributes:
        pooling: How neighbouring tokens are pooled, "avg" or "max".
        reduce: How the query heads of a KV group vote, "mean" or "max".

    """

    pooling: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_choice("reduce", self.reduce, ("mean", "max"))

    def score(self, layer: LayerInput) -> Tensor:
        return self.votes(layer, times=1)

    def votes(self, layer: LayerInput, times: int) -> Tensor:
        """Return the scores times a factor, fp32 [N, S']."""
        return window_votes(
            layer, kernel=self.kernel, pooling=self.pooling, reduce=self.reduce, times=times
        )


SnapKV = MethodSpec(name="snapkv", scorer=SnapKVScorer)

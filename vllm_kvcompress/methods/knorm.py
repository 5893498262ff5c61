"""Knorm: the tokens whose keys are shortest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.keys import KEY_NEEDS, score_keys
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Knorm(EqualShares):
    """Key norms (arXiv 2406.11430): a token is worth minus the L2 norm of its key.

    Every layer keeps equally many, every KV head its own.

    ``window``: protected tokens; no query is looked at.

    Differences from the released code (l2compress): the last tokens are protected, and no layer is
    left whole, for which the release has an option.
    """

    name: ClassVar[str] = "knorm"
    needs: ClassVar[frozenset[Need]] = KEY_NEEDS

    def score(self, layer: LayerInput) -> LayerScores:
        return LayerScores(score_keys(layer, self.window, self.name, _shortness))


def _shortness(keys: Tensor) -> Tensor:
    return -keys.norm(dim=-1)

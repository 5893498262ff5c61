"""KeyDiff: the tokens whose keys differ most from the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.keys import KEY_NEEDS, score_keys
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class KeyDiff(EqualShares):
    """KeyDiff (arXiv 2504.15364).

    A token is worth minus the cosine between its key and the mean of all normalised keys of the
    KV head, the window's included, all as they are cached, after RoPE. Every layer keeps equally
    many.

    ``window``: protected tokens; no query is looked at.

    Difference from the paper: one cut at the prompt's end instead of one after each block of the
    prompt; an engine that streams its prefill comes close to that.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[frozenset[Need]] = KEY_NEEDS

    def score(self, layer: LayerInput) -> LayerScores:
        return LayerScores(score_keys(layer, self.window, self.name, _unlikeness))


def _unlikeness(keys: Tensor) -> Tensor:
    """Minus the cosine of each key [S, D] to the mean direction; 0 for a key of zero length."""
    directions = F.normalize(keys, dim=-1)
    return -(directions @ F.normalize(directions.mean(dim=0), dim=0))

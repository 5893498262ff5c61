"""What a request gets whose method fails: as many tokens in every layer, the most recent ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.methods import EqualShares, LayerInput, LayerScores, Method, Scorer


@dataclass(frozen=True, kw_only=True)
class MostRecent(Scorer, EqualShares):
    """Reads nothing and divides nothing, so that there is nothing in it that can fail."""

    least_window: ClassVar[int] = 0

    def score(self, layer: LayerInput) -> Tensor:
        return _by_place(layer.num_kv_heads, layer.history)


def fallback_of(method: Method) -> Method:
    """Return what takes a method's place in a request, under its name and with its window."""
    part = MostRecent(window=method.window)
    return Method(method.name, part, part)


def fallback_scores(method: Method, lengths: Sequence[int], heads: int) -> list[LayerScores]:
    """Return the fallback's scores of some layers, on the CPU.

    Args:
        method: The request's own.
        lengths: Tokens that each layer holds.
        heads: KV heads N.

    """
    return [LayerScores(_by_place(heads, length - method.window)) for length in lengths]


def _by_place(heads: int, history: int) -> Tensor:
    """The later a token is stored, the more it is worth: fp32 [heads, history]."""
    return torch.arange(history, dtype=torch.float32).expand(heads, -1)

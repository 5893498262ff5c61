"""PyramidKV: SnapKV's tokens, and budgets that fall from the first layer to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.methods.base import LayerScores
from vllm_kvcompress.methods.registry import register
from vllm_kvcompress.methods.snapkv import SnapKV


@register
@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069): SnapKV's scores, linear budgets.

    With base = C - w history tokens on average, the last layer gets min = base // ``beta``, the
    first max = 2 base - min, and those between them lie on a straight line. If max reaches S', the
    first layer keeps all and min = 2 base - S'. Prompts shorter than 2 base tokens get equal
    budgets.

    ``beta``: at least 1, which means equal budgets; the larger, the steeper. Other parameters as
    for SnapKV.

    Differences from the released code (KVCache-Factory pyramidkv_utils.py) besides those of
    SnapKV: the line is real, where the release rounds its step down and so gives later layers up
    to L - 1 tokens more than the pool holds. The allocator then divides the pool in proportion, in
    whole pages in an engine.
    """

    name: ClassVar[str] = "pyramidkv"
    allocator_params: ClassVar[frozenset[str]] = frozenset({"beta"})

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("beta", 1)

    def cap(self, history: int, base: int) -> int:
        """Some layers get more than the average."""
        return history

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        history = max(scores.tokens.shape[-1] for scores in seen)
        if num_layers == 1 or history + self.window < 2 * base:
            return np.ones(len(seen), dtype=np.float64)
        least = base // self.beta
        most = 2 * base - least
        if most >= history:
            most, least = history, 2 * base - history
        line = np.linspace(most, least, num_layers, dtype=np.float64)
        return line[: len(seen)]

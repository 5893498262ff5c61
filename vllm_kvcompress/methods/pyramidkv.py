"""PyramidKV (arXiv 2406.02069): SnapKV's tokens, and budgets that fall from layer to layer.

Differences from the released code (KVCache-Factory pyramidkv_utils.py) besides those of SnapKV: the
line is real, where the release rounds its step down and so gives later layers up to L - 1 tokens
more than the pool holds. The pool is then divided in proportion, in whole pages in an engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.methods.checks import check_int
from vllm_kvcompress.methods.layer import LayerScores
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Allocator
from vllm_kvcompress.methods.snapkv import SnapKVScorer


@dataclass(frozen=True, kw_only=True)
class PyramidKVAllocator(Allocator):
    """Budgets on a straight line from the first layer to the last.

    With base = C - w history tokens on average, the last layer gets min = base // ``beta``, the
    first max = 2 base - min. If max reaches S', the first layer keeps all and min = 2 base - S'.
    Prompts shorter than 2 base tokens get equal budgets.

    Attributes:
        beta: At least 1, which means equal budgets; the larger, the steeper.

    """

    budgets_ignore_scores = True

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("beta", self.beta, 1)

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


PyramidKV = MethodSpec(name="pyramidkv", scorer=SnapKVScorer, allocator=PyramidKVAllocator)

"""CAKE's scores without the variance, and equal budgets: the neutral baseline.

Source: SnapKV (arXiv 2404.14469), in the per-KV-head form of kvpress; ``snapkv`` with its default
parameters scores alike.
"""

from dataclasses import dataclass

from torch import Tensor

from vllm_kvcompress.methods.checks import check_odd
from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer
from vllm_kvcompress.methods.reads import WINDOW_NEEDS, window_votes


@dataclass(frozen=True, kw_only=True)
class UniformScorer(Scorer):
    """A token is worth the mean attention that it receives from the window's queries.

    The heads of a KV group vote by their mean, as in CAKE, so that a comparison with CAKE shows the
    effect of layer budgets and the variance term and nothing else.

    Attributes:
        kernel: Width of the average pooling along tokens, odd.

    """

    needs = WINDOW_NEEDS
    uses_window_statistics = True

    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("kernel", self.kernel)

    def score(self, layer: LayerInput) -> Tensor:
        return window_votes(layer, kernel=self.kernel)


Uniform = MethodSpec(name="uniform", scorer=UniformScorer)

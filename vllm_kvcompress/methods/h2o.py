"""H2O (arXiv 2306.14048) on the observation window: heavy hitters, without pooling.

The paper sums over every query of the prompt, for which all of them would have to be collected and
S x S probabilities computed; a longer ``window`` comes closer.
"""

from torch import Tensor

from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer
from vllm_kvcompress.methods.reads import WINDOW_NEEDS, window_votes


class H2OScorer(Scorer):
    """A token is worth the attention that it receives from the window's queries.

    The mean over queries ranks as the paper's sum; the heads of a KV group are averaged.
    """

    needs = WINDOW_NEEDS
    uses_window_statistics = True

    def score(self, layer: LayerInput) -> Tensor:
        return window_votes(layer, kernel=1)


H2O = MethodSpec(name="h2o", scorer=H2OScorer)

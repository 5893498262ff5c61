"""Key norms (arXiv 2406.11430): the tokens whose keys are shortest.

Differences from the released code (l2compress): the last tokens are protected, and no layer is left
whole, for which the release has an option.
"""

from torch import Tensor

from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer
from vllm_kvcompress.methods.reads import KEY_NEEDS, score_keys


class KnormScorer(Scorer):
    """A token is worth minus the L2 norm of its key; every KV head keeps its own tokens."""

    needs = KEY_NEEDS

    def score(self, layer: LayerInput) -> Tensor:
        return score_keys(layer, lambda keys: -keys.norm(dim=-1))


Knorm = MethodSpec(name="knorm", scorer=KnormScorer)

"""KeyDiff (arXiv 2504.15364): the tokens whose keys differ most from the average key.

Difference from the paper: one cut at the prompt's end instead of one after each block of the
prompt; an engine that streams its prefill comes close to that.
"""

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer
from vllm_kvcompress.methods.reads import KEY_NEEDS, score_keys


class KeyDiffScorer(Scorer):
    """A token is worth minus the cosine between its key and the mean direction of its KV head.

    The mean is that of all normalised keys, the window's included, as they are cached, after RoPE.
    """

    needs = KEY_NEEDS

    def score(self, layer: LayerInput) -> Tensor:
        return score_keys(layer, _unlikeness)


def _unlikeness(keys: Tensor) -> Tensor:
    """Minus the cosine of each key [S, D] to the mean direction; 0 for a key of zero length."""
    directions = F.normalize(keys, dim=-1)
    return -(directions @ F.normalize(directions.mean(dim=0), dim=0))


KeyDiff = MethodSpec(name="keydiff", scorer=KeyDiffScorer)

"""TOVA (arXiv 2401.06104): the tokens that the very last query looks at, the same for all heads.

Differences from the paper: the last token is always kept, and a prompt is cut once at its end
instead of token by token while it is computed and while the model answers.
"""

from torch import Tensor

from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer
from vllm_kvcompress.methods.reads import (
    WINDOW_NEEDS,
    attention_statistics,
    observe,
    queries_and_keys,
)


class TovaScorer(Scorer):
    """A token is worth the attention of the last query, averaged over all query heads of a layer.

    All KV heads keep the same tokens. A ``window`` beyond 1 protects more tokens, and the last
    query alone still judges.
    """

    needs = WINDOW_NEEDS

    @property
    def uses_window_statistics(self) -> bool:
        # Statistics of a longer window do not tell its last query from the others.
        return self.window == 1

    def score(self, layer: LayerInput) -> Tensor:
        if self.window == 1:
            statistics = observe(layer)
        else:
            queries, keys = queries_and_keys(layer)
            statistics = attention_statistics(layer, queries[:, -1:], keys)
        return statistics.mean.mean(dim=0).repeat(layer.num_kv_heads, 1)


Tova = MethodSpec(name="tova", scorer=TovaScorer, window=1)

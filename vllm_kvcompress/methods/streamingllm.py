"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones, whatever they say.

Difference from the paper: kept keys stay rotated to the positions they had in the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_kvcompress.methods.checks import check_choice, check_int
from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer


@dataclass(frozen=True, kw_only=True)
class StreamingLLMScorer(Scorer):
    """Every layer and head keeps the same tokens, by their position alone.

    Attributes:
        sinks: Attention sinks, at least 0; not with "first".
        variant: "recent" keeps the first ``sinks`` tokens and the most recent ones, as the paper
            does. "first" keeps the first C - w tokens and the last w, which is what KVCache-Factory
            runs under this name and so, as far as can be told, what the tables of PyramidKV and
            DynamicKV show.

    """

    sinks: int = 4
    variant: Literal["recent", "first"] = "recent"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        check_choice("variant", self.variant, ("recent", "first"))

    def idle(self) -> Mapping[str, str]:
        return {"sinks": 'variant is "first"'} if self.variant == "first" else {}

    def score(self, layer: LayerInput) -> Tensor:
        # Whole numbers, which fp32 holds exactly up to 2 ** 24.
        position = torch.arange(layer.history, dtype=torch.float32)
        if self.variant == "first":
            worth = -position
        else:
            worth = torch.where(position < self.sinks, 2 * len(position) - position, position)
        return worth.repeat(layer.num_kv_heads, 1)


StreamingLLM = MethodSpec(name="streamingllm", scorer=StreamingLLMScorer)

"""StreamingLLM: the first tokens and the most recent ones, whatever they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EqualShares):
    """StreamingLLM (arXiv 2309.17453).

    Every layer and head keeps the same tokens, by their position alone.

    ``window``: protected tokens. ``variant``: "recent" keeps the first ``sinks`` tokens and the
    most recent ones, as the paper does; "first" keeps the first C - w tokens and the last w, which
    is what KVCache-Factory runs under this name and so, as far as can be told, what the tables of
    PyramidKV and DynamicKV show. ``sinks``: attention sinks, at least 0; without effect on "first".

    Difference from the paper: kept keys stay rotated to the positions they had in the text.
    """

    name: ClassVar[str] = "streamingllm"
    needs: ClassVar[frozenset[Need]] = frozenset()
    scorer_params: ClassVar[frozenset[str]] = frozenset({"sinks", "variant"})

    sinks: int = 4
    variant: Literal["recent", "first"] = "recent"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("sinks", 0)
        self._check_choice("variant", ("recent", "first"))

    def score(self, layer: LayerInput) -> LayerScores:
        # Whole numbers, which fp32 holds exactly up to 2 ** 24.
        position = torch.arange(layer.num_tokens - self.window, dtype=torch.float32)
        if self.variant == "first":
            worth = -position
        else:
            first = position < self.sinks
            worth = torch.where(first, 2 * len(position) - position, position)
        return LayerScores(worth.repeat(layer.num_kv_heads, 1))

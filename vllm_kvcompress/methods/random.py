"""Tokens by lot, the same number in every layer: what a method must at least beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.equal import EqualShares
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Random(EqualShares):
    """Equal budgets, random tokens, drawn anew for every layer and KV head.

    ``window``: protected tokens. ``seed``: the same seed gives the same tokens for a prompt of the
    same length, on every device and whatever else is in the batch.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset()
    scorer_params: ClassVar[frozenset[str]] = frozenset({"seed"})

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("seed", 0)

    def score(self, layer: LayerInput) -> LayerScores:
        # Drawn on the CPU: generators of different devices disagree.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + layer.layer) % 2**63)
        shape = (layer.num_kv_heads, layer.num_tokens - self.window)
        return LayerScores(torch.rand(shape, generator=generator))

"""Keeps every token but moves all pages: shows whether the engine's bookkeeping is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Method, Need
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Scatter(Method):
    """Debugging: nothing is evicted, so outputs must equal those without compression.

    ``window`` has no effect.
    """

    name: ClassVar[str] = "scatter"
    needs: ClassVar[frozenset[Need]] = frozenset()
    keeps_all: ClassVar[bool] = True

    def score(self, layer: LayerInput) -> LayerScores:
        """Never called by the engine; raises RuntimeError."""
        raise RuntimeError("scatter keeps all tokens and has no scores")

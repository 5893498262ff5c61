"""No compression: for servers where only requests that ask for it are compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Method, Need
from vllm_kvcompress.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class NoCompression(Method):
    """Requests take plain vLLM's path.

    ``window`` has no effect.
    """

    name: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset()
    keeps_all: ClassVar[bool] = True

    def score(self, layer: LayerInput) -> LayerScores:
        """Never called by the engine; raises RuntimeError."""
        raise RuntimeError("none keeps all tokens and has no scores")

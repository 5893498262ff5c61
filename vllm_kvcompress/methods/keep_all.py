"""Methods that evict nothing: ``none`` and ``scatter``."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from vllm_kvcompress.methods.layer import LayerInput, LayerScores
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Inseparable


class KeepAll(Inseparable):
    """Keeps every token. The engine never asks it for scores or weights."""

    keeps_all = True

    def idle(self) -> Mapping[str, str]:
        return {"window": "every token is kept"}

    def score(self, layer: LayerInput) -> Tensor:
        """Raise RuntimeError."""
        raise RuntimeError("a method that keeps all tokens has no scores")

    def weights(self, seen: Sequence[LayerScores], *, base: int, num_layers: int) -> NoReturn:
        """Raise RuntimeError."""
        raise RuntimeError("a method that keeps all tokens has no weights")


NoCompression = MethodSpec(name="none", scorer=KeepAll)
"""Requests take plain vLLM's path: for servers where only requests that ask are compressed."""

Scatter = MethodSpec(name="scatter", scorer=KeepAll)
"""Moves all pages about, so outputs must equal those without compression: for debugging."""

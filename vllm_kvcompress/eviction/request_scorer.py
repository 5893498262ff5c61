"""Scores of one request's tokens, from its pages or from keys that are at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics
from vllm_kvcompress.methods import LayerInput, LayerScores, Method, Need
from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import PageCodec


@dataclass(frozen=True)
class HeldTokens:
    """What a request's layers hold when they are scored.

    Attributes:
        pages: Per layer the flat page ids in token order.
        lengths: Per layer the tokens in them.
        capacity: Tokens that an average layer is to keep, window included.
        windows: Queries of the last tokens, [L, w, H, D]; None if the method looks at none.

    """

    pages: Sequence[IntArray]
    lengths: Sequence[int]
    capacity: int
    windows: Tensor | None


class RequestScorer:
    """Gives a method what it reads of each layer.

    Args:
        method: The request's.
        codec: Reads tokens of pages.
        layers: One entry per layer of the arena.

    """

    def __init__(self, method: Method, codec: PageCodec, layers: Sequence[AttentionParams]) -> None:
        self._method = method
        self._codec = codec
        self._layers = layers

    def score_all(self, held: HeldTokens) -> list[LayerScores]:
        """Score every layer from its pages."""
        num_layers = len(self._layers)
        step = 1
        if held.windows is not None:
            step = self._codec.layers_per_launch(max(held.lengths), held.windows.shape[2])
        scores: list[LayerScores] = []
        for first in range(0, num_layers, step):
            scores += self.score_some(held, range(first, min(first + step, num_layers)))
        return scores

    def score_some(self, held: HeldTokens, layers: range) -> list[LayerScores]:
        """Score neighbouring layers from their pages, in one launch where there is a kernel."""
        found = None
        part = slice(layers.start, layers.stop)
        if held.windows is not None and self._method.uses_window_statistics:
            found = self._codec.observe(
                held.windows[part], held.pages[part], held.lengths[part], self._layers[part]
            )
        return [
            self.score_layer(
                held,
                layer,
                read_keys=partial(self._codec.read_keys, held.pages[layer], held.lengths[layer]),
                statistics=None if found is None else found[layer - layers.start],
            )
            for layer in layers
        ]

    def score_layer(
        self,
        held: HeldTokens,
        layer: int,
        *,
        keys: Tensor | None = None,
        read_keys: Callable[[], Tensor] | None = None,
        statistics: WindowStatistics | None = None,
    ) -> LayerScores:
        """Score a layer, from all its keys after RoPE, [N, S, D], where they are at hand."""
        attention = self._layers[layer]
        given = LayerInput(
            layer=layer,
            num_layers=len(self._layers),
            num_tokens=held.lengths[layer],
            window=self._method.window,
            num_kv_heads=self._codec.num_kv_heads,
            base=held.capacity - self._method.window,
            queries=None if held.windows is None else held.windows[layer].transpose(0, 1),
            keys=keys,
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            sinks=attention.sinks,
            read_keys=read_keys if Need.KEYS in self._method.needs else None,
            observe=None if statistics is None else lambda: statistics,
        )
        return self._method.score(given)

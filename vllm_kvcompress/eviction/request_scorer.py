"""Scores of one request's tokens, from its pages or from keys that are at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from vllm_kvcompress.methods import LayerBatch, LayerInput, LayerScores, Method, Need
from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import JobPages, PageCodec


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
        jobs = self._codec.open(held.pages, held.lengths)
        return self.score_together([held], jobs)[0]

    def score_together(
        self, helds: Sequence[HeldTokens], jobs: JobPages
    ) -> list[list[LayerScores]]:
        """Score every layer of several requests, in as few launches as their statistics fit in.

        Args:
            helds: What each request holds.
            jobs: The pages of all of them, opened.

        Returns:
            Per request the scores of its layers.

        """
        layers, step = len(self._layers), 1
        if helds[0].windows is not None:
            longest = max(max(held.lengths) for held in helds)
            step = self._codec.layers_per_launch(longest, helds[0].windows.shape[2])
        scores: list[LayerScores] = []
        for first in range(0, layers * len(helds), step):
            stop = min(first + step, layers * len(helds))
            places = [divmod(job, layers) for job in range(first, stop)]
            scores += self._score_jobs([(helds[r], n) for r, n in places], jobs.part(first, stop))
        return [scores[first : first + layers] for first in range(0, len(scores), layers)]

    def score_some(self, held: HeldTokens, layers: range) -> list[LayerScores]:
        """Score neighbouring layers from their pages, in one launch where there is a kernel."""
        part = slice(layers.start, layers.stop)
        jobs = self._codec.open(held.pages[part], held.lengths[part])
        return self._score_jobs([(held, layer) for layer in layers], jobs)

    def _score_jobs(
        self, layers: Sequence[tuple[HeldTokens, int]], jobs: JobPages
    ) -> list[LayerScores]:
        """Score layers of some requests, all jobs together."""
        batch, windows = None, _windows(layers)
        if windows is not None and self._method.uses_window_statistics:
            facts = [self._layers[layer] for _, layer in layers]
            found = self._codec.observe(windows, jobs, facts)
            batch = None if found is None else LayerBatch(found)
        return [
            self.score_layer(
                held,
                layer,
                read_keys=partial(self._codec.read_keys, held.pages[layer], held.lengths[layer]),
                batch=batch,
                job=job,
            )
            for job, (held, layer) in enumerate(layers)
        ]

    def score_layer(
        self,
        held: HeldTokens,
        layer: int,
        *,
        keys: Tensor | None = None,
        read_keys: Callable[[], Tensor] | None = None,
        batch: LayerBatch | None = None,
        job: int = 0,
    ) -> LayerScores:
        """Score a layer.

        Args:
            held: What its request holds.
            layer: Its index.
            keys: All its keys after RoPE, [N, S, D], where they are at hand.
            read_keys: Reads them.
            batch: Layers that have been observed together, this one among them.
            job: Its place there.

        """
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
            observe=None if batch is None else partial(batch.statistics.job, job),
            batch=batch,
            job=job,
        )
        return self._method.score(given)


def _windows(layers: Sequence[tuple[HeldTokens, int]]) -> Tensor | None:
    """Queries of some layers, [layers, w, H, D]; those of one request, neighbours, as a view."""
    parts: list[Tensor] = []
    for _, places in groupby(layers, lambda place: id(place[0])):
        own = list(places)
        windows, first = own[0][0].windows, own[0][1]
        if windows is None:
            return None
        parts.append(windows[first : first + len(own)])
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Scores of one request's tokens, from its pages or from keys that are at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from vllm_kvcompress.methods import (
    LayerBatch,
    LayerInput,
    LayerScores,
    Method,
    MethodError,
    Need,
)
from vllm_kvcompress.methods.faults import check_device, method_code
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
        """Score every layer from its pages.

        Raises:
            MethodError: The method has failed.

        """
        jobs = self._codec.open(held.pages, held.lengths)
        (found,) = self.score_together([held], jobs)
        if isinstance(found, MethodError):
            raise found
        return found

    def score_together(
        self, helds: Sequence[HeldTokens], jobs: JobPages
    ) -> list[list[LayerScores] | MethodError]:
        """Score every layer of several requests, in as few launches as their statistics fit in.

        Args:
            helds: What each request holds.
            jobs: The pages of all of them, opened.

        Returns:
            Per request the scores of its layers, or what the method has failed with.

        """
        layers, step = len(self._layers), 1
        if helds[0].windows is not None:
            longest = max(max(held.lengths) for held in helds)
            step = self._codec.layers_per_launch(longest, helds[0].windows.shape[2])
        scores: list[LayerScores | MethodError] = []
        for first in range(0, layers * len(helds), step):
            stop = min(first + step, layers * len(helds))
            places = [divmod(job, layers) for job in range(first, stop)]
            scores += self._score_jobs([(helds[r], n) for r, n in places], jobs.part(first, stop))
        return [_of_one(scores[first : first + layers]) for first in range(0, len(scores), layers)]

    def score_from_pages(self, held: HeldTokens, layer: int) -> LayerScores:
        """Score one layer from its pages, by a kernel where there is one.

        Raises:
            MethodError: The method has failed.

        """
        part = slice(layer, layer + 1)
        jobs = self._codec.open(held.pages[part], held.lengths[part])
        (found,) = self._score_jobs([(held, layer)], jobs)
        if isinstance(found, MethodError):
            raise found
        return found

    def _score_jobs(
        self, layers: Sequence[tuple[HeldTokens, int]], jobs: JobPages
    ) -> list[LayerScores | MethodError]:
        """Score layers of some requests, all jobs together; faults of one leave the others be."""
        batch, windows = None, _windows(layers)
        if windows is not None and self._method.uses_window_statistics:
            facts = [self._layers[layer] for _, layer in layers]
            found = self._codec.observe(windows, jobs, facts)
            batch = None if found is None else LayerBatch(found)
        scores: list[LayerScores | MethodError] = []
        for job, (held, layer) in enumerate(layers):
            read = partial(self._codec.read_keys, held.pages[layer], held.lengths[layer])
            try:
                scores.append(self.score_layer(held, layer, read_keys=read, batch=batch, job=job))
            except MethodError as fault:
                scores.append(fault)
        return scores

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

        Raises:
            MethodError: The method has failed.

        """
        attention = self._layers[layer]
        pages = None if read_keys is None else _PageReads(read_keys)
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
            read_keys=pages if Need.KEYS in self._method.needs else None,
            observe=None if batch is None else partial(batch.statistics.job, job),
            batch=batch,
            job=job,
        )
        name = self._method.name
        try:
            with method_code(name, f"scoring layer {layer}"):
                scores = self._method.score(given)
        except MethodError:
            if pages is not None and pages.failure is not None:
                raise pages.failure from None  # ours, whatever the method made of it
            raise
        check_device(name, layer, scores, self._codec.device)
        return scores


class _PageReads:
    """Reads a layer's keys for a method, and remembers if that failed: no fault of the method.

    Args:
        read: Reads them.

    Attributes:
        failure: What it has raised; too little memory is left out, as that is the request's matter.

    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read
        self.failure: Exception | None = None

    def __call__(self) -> Tensor:
        try:
            return self._read()
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError):
                self.failure = error
            raise


def _of_one(found: Sequence[LayerScores | MethodError]) -> list[LayerScores] | MethodError:
    """The scores of one request's layers, or its first fault."""
    scores = []
    for each in found:
        if isinstance(each, MethodError):
            return each
        scores.append(each)
    return scores


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

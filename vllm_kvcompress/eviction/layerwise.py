"""Dividing an arena while a prompt's layers still run, so that its cache is never whole at once.

Only the layers since the last division have their keys and values in full, in a workspace of pages
that all layers reuse in turn. Survivors go to the arena. When a later layer needs room there,
earlier layers give pages back: each lists its tokens by ascending score, so that giving up its
first pages is all there is to do, and nothing moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.eviction.apportionment import Floats
from vllm_kvcompress.eviction.fallback import fallback_of, fallback_scores
from vllm_kvcompress.eviction.layer_budgets import page_division
from vllm_kvcompress.eviction.pinned_tokens import PinnedPlaces
from vllm_kvcompress.eviction.selection import Order, tokens_to_keep
from vllm_kvcompress.methods import LayerScores, Method, MethodError, to_numbers
from vllm_kvcompress.methods.faults import check_stats
from vllm_kvcompress.paging.arena import IntArray, PageGeometry
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.compression_schedule import Cut


@dataclass(frozen=True)
class Placement:
    """Survivors to be copied from a layer's workspace into the arena.

    Attributes:
        layer: Index of the layer in the arena.
        tokens: Token numbers in storage order, int [N, T].
        pages: Flat ids of the pages that take them, int64 [T / block_size].

    """

    layer: int
    tokens: Tensor
    pages: IntArray


class LayerwiseEviction:
    """One prompt's division while its layers run one after another.

    Args:
        method: Scores and weighs layers; ``budgets_are_nested``.
        geometry: The pool's shape.
        cut: The cut at the prompt's end, which this makes layer by layer.
        cached: Leading blocks whose pages hold the prompt's first tokens already.
        workspace: Blocks whose pages the layers between two divisions share.
        arena: The ``cut.blocks`` blocks that take the survivors.
        layers_per_division: Most layers between two divisions.
        pinned: Tokens that stay in every layer and head; those in the window do so anyway.

    Attributes:
        sources: Per layer the flat ids of the pages where its tokens are while it runs, int64 [n].
        tables: Per layer seen and cut, the pages it holds now, lowest scores first.
        kept: Per layer seen and cut, its tokens in that order, int [N, T].
        fault: What the method has failed with; None as long as it has not.

    Raises:
        ValueError: The workspace is too small.

    """

    def __init__(
        self,
        method: Method,
        geometry: PageGeometry,
        cut: Cut,
        *,
        cached: Sequence[int],
        workspace: Sequence[int],
        arena: Sequence[int],
        layers_per_division: int,
        pinned: PinnedPlaces | None = None,
    ) -> None:
        self.cut = cut
        self.tables: list[IntArray] = []
        self.kept: list[Tensor] = []
        self.fault: MethodError | None = None
        self._method = method
        self._num_layers = geometry.num_layers
        self._block_size = geometry.block_size
        self._free: list[int] = geometry.all_pages(arena).T.reshape(-1).tolist()
        self._waiting: list[LayerScores] = []
        self._pinned = pinned
        divide = partial(
            page_division,
            num_layers=geometry.num_layers,
            pages_per_layer=cut.blocks,
            block_size=geometry.block_size,
            lengths=cut.position,
            pinned=pinned.count if pinned else 0,
        )
        try:
            self._division = divide(method)
        except MethodError as fault:  # in its cap or floor
            self.fault, self._method = fault, fallback_of(method)
            self._division = divide(self._method)
        self._known_ahead = self._method.allocator.budgets_ignore_scores
        self._given: IntArray | None = None
        self.sources = self._lay_out(geometry, cached, workspace, layers_per_division)

    def _lay_out(
        self,
        geometry: PageGeometry,
        cached: Sequence[int],
        workspace: Sequence[int],
        layers_per_division: int,
    ) -> list[IntArray]:
        own = cdiv(self.cut.position, geometry.block_size) - len(cached)
        spare = geometry.all_pages(workspace).T.reshape(-1)
        if own * layers_per_division > len(spare):
            raise ValueError(
                f"{len(workspace)} blocks have too few pages for {layers_per_division} x {own}"
            )
        sources = []
        for layer in range(geometry.num_layers):
            turn = layer % layers_per_division * own
            pages = (geometry.pages(layer, cached), spare[turn : turn + own])
            sources.append(np.concatenate(pages))
        return sources

    @property
    def done(self) -> bool:
        """Whether all layers have been seen and cut."""
        return len(self.tables) == self._num_layers

    @property
    def weights(self) -> Floats | None:
        """The allocator's weights of the layers at the last division; None before it."""
        return self._division.weights

    def fall_back(self, fault: MethodError, heads: int) -> None:
        """Go on without the method. Mutates this.

        Layers that are cut keep what the method has chosen, and give back what later ones need;
        the others, those that wait for a division among them, keep their most recent tokens. All
        weigh the same from now on, unless budgets were known before the first layer.

        Args:
            fault: What the method has failed with.
            heads: KV heads N.

        """
        self.fault = fault
        self._method = fallback_of(self._method)
        self._division.share_equally(self._method)
        self._waiting = self._recent(heads) * len(self._waiting)

    def take_without_scores(self, heads: int) -> list[Placement]:
        """As :meth:`take`, for a layer of ``heads`` KV heads after the method has failed."""
        return self.take(*self._recent(heads))

    def _recent(self, heads: int) -> list[LayerScores]:
        return fallback_scores(self._method, [self.cut.position], heads)

    def take(self, scores: LayerScores) -> list[Placement]:
        """Take in the next layer; where the arena is divided, say what to copy. Mutates this.

        A fault of the method ends in :meth:`fall_back`.

        Args:
            scores: Scores of the layer whose attention has just run.

        Returns:
            What must be copied before the workspace is written again; nothing between divisions.
            A target page may have belonged to an earlier layer, never to a source.

        """
        self._waiting.append(scores)
        heads = len(scores.tokens)
        try:
            pages = self._pages()
        except MethodError as fault:
            self.fall_back(fault, heads)
            pages = self._pages()
        if pages is None:
            return []
        for layer, left in enumerate(pages[: len(self.tables)].tolist()):
            self._shrink(layer, left)
        placements = []
        for place in range(len(self._waiting)):
            layer = len(self.tables)
            count = int(pages[layer])
            taken, self._free = self._free[:count], self._free[count:]
            try:
                tokens = self._choose(layer, place, count)
            except MethodError as fault:
                self.fall_back(fault, heads)
                tokens = self._choose(layer, place, count)
            self.tables.append(np.asarray(taken, dtype=np.int64))
            self.kept.append(tokens)
            placements.append(Placement(layer, tokens, self.tables[-1]))
        self._waiting = []
        return placements

    def _choose(self, layer: int, place: int, pages: int) -> Tensor:
        """Tokens of a waiting layer that fill some pages, the least worthy first."""
        (tokens,) = tokens_to_keep(
            self._method,
            [self._waiting[place]],
            [pages],
            block_size=self._block_size,
            lengths=[self.cut.position],
            order=Order.WORST_FIRST,
            pinned=[self._pinned.places[layer]] if self._pinned else None,
        )
        return tokens

    def in_order(self, layer: int) -> Tensor:
        """Where a layer's tokens lie now, in their final storage order: int64 [N, T]."""
        kept = self.kept[layer]
        if not self._method.scorer.stores_by_worth:
            if kept.device.type == "cpu":  # NumPy's sort is some ten times as fast
                return torch.from_numpy(kept.numpy().argsort(axis=-1))
            return kept.argsort(dim=-1)
        places = torch.arange(kept.shape[1], device=kept.device).expand(len(kept), -1)
        history = kept.shape[1] - self._method.window
        return torch.cat([places[:, :history].flip(1), places[:, history:]], dim=1)

    def stored(self) -> list[Tensor]:
        """Per layer its tokens once they lie :meth:`in_order`, int [N, T]."""
        return [kept.gather(1, self.in_order(layer)) for layer, kept in enumerate(self.kept)]

    def _pages(self) -> IntArray | None:
        """Pages of at least the layers seen, int64; None where the arena is not divided now."""
        newest = self._waiting[-1]
        if not self._known_ahead:
            (numbers,) = to_numbers([newest])
            check_stats(self._method.name, [numbers], len(self.tables) + len(self._waiting) - 1)
            return self._division.add(numbers)
        if self._given is None:  # shapes are all that matters, and those of all layers are the same
            self._given = self._division.divide_all([newest] * self._num_layers)
        return self._given

    def _shrink(self, layer: int, pages: int) -> None:
        given = len(self.tables[layer]) - pages
        if not given:
            return
        if given < 0:
            raise RuntimeError(f"layer {layer} would grow from {pages - given} to {pages} pages")
        self._free.extend(self.tables[layer][:given].tolist())
        self.tables[layer] = self.tables[layer][given:]
        self.kept[layer] = self.kept[layer][:, given * self._block_size :]

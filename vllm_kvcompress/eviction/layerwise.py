"""Compressing a prompt while it runs: each layer is cut as soon as its attention is done.

Only the layers since the last cut have their keys and values in full, in a workspace of pages that
all layers reuse in turn. Survivors go to the arena. When a later layer needs room there, earlier
layers give pages back: each lists its tokens by ascending worth, so that giving up its first pages
is all there is to do, and nothing moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.eviction.layer_budgets import page_budgets, page_cascade
from vllm_kvcompress.eviction.pinned_tokens import rank_first
from vllm_kvcompress.eviction.selection import by_worth, with_window
from vllm_kvcompress.methods import LayerScores, Method, to_numbers
from vllm_kvcompress.paging.arena import ArenaPlan, IntArray, PageGeometry


@dataclass(frozen=True)
class Placement:
    """Survivors to be copied from a layer's workspace into the arena.

    Attributes:
        layer: Which.
        tokens: int [N, T], token numbers in the order in which they are to lie.
        pages: int64 [T / block_size], flat ids of the pages that take them.

    """

    layer: int
    tokens: Tensor
    pages: IntArray


class LayerwiseEviction:
    """One prompt's division while its layers run one after another.

    Args:
        method: Scores and weighs layers; ``budgets_are_nested``.
        geometry: The pool's shape.
        plan: What the request holds in the end.
        cached: Leading blocks whose pages hold the prompt's first tokens already.
        workspace: Blocks whose pages the layers between two cuts share.
        arena: The ``plan.arena_blocks`` blocks that take the survivors.
        layers_per_division: Most layers between two cuts.
        pinned: Tokens that stay in every layer and head, int64 [K], ascending; those in the window
            do so anyway.
        pinned_count: Tokens outside of the window that every layer must have room for.

    Attributes:
        sources: Per layer the flat ids of the pages where its tokens are while it runs, int64 [n].
        tables: Per layer seen and cut, the pages it holds now, least worth first.
        kept: Per layer seen and cut, its tokens in that order, int [N, T].

    Raises:
        ValueError: The workspace is too small.

    """

    def __init__(
        self,
        method: Method,
        geometry: PageGeometry,
        plan: ArenaPlan,
        *,
        cached: Sequence[int],
        workspace: Sequence[int],
        arena: Sequence[int],
        layers_per_division: int,
        pinned: Tensor | None = None,
        pinned_count: int = 0,
    ) -> None:
        self.plan = plan
        self.tables: list[IntArray] = []
        self.kept: list[Tensor] = []
        self._method = method
        self._num_layers = geometry.num_layers
        self._free: list[int] = geometry.all_pages(arena).T.reshape(-1).tolist()
        self._waiting: list[LayerScores] = []
        self._cascade, self._reserved = page_cascade(
            method,
            num_layers=geometry.num_layers,
            pages_per_layer=plan.arena_blocks,
            block_size=plan.block_size,
            lengths=plan.prompt_len,
            pinned=pinned_count,
        )
        self._pinned, self._pinned_count = pinned, pinned_count
        self.sources = self._lay_out(geometry, cached, workspace, layers_per_division)

    def _lay_out(
        self,
        geometry: PageGeometry,
        cached: Sequence[int],
        workspace: Sequence[int],
        layers_per_division: int,
    ) -> list[IntArray]:
        own = self.plan.prompt_blocks - len(cached)
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

    def take(self, scores: LayerScores) -> list[Placement]:
        """Take in the next layer; at a cut, say what is to be copied. Mutates the cascade.

        Args:
            scores: Of the layer whose attention has just run.

        Returns:
            What must be copied before the workspace is written again; nothing between cuts. A
            target page may have belonged to an earlier layer, never to a source.

        """
        self._waiting.append(scores)
        seen = len(self.tables) + len(self._waiting)
        if self._method.budgets_ignore_scores:
            counts = self._local_counts(seen)
        else:
            scores = to_numbers([scores])[0]
            found = self._cascade.add(scores)
            if found is None:
                return []
            counts = found + self._reserved
        for layer in range(len(self.tables)):
            self._shrink(layer, int(counts[layer]))
        placements = []
        for waiting in self._waiting:
            layer = len(self.tables)
            count = int(counts[layer])
            pages, self._free = self._free[:count], self._free[count:]
            tokens = self._choose(waiting, count)
            self.tables.append(np.asarray(pages, dtype=np.int64))
            self.kept.append(tokens)
            placements.append(Placement(layer, tokens, self.tables[-1]))
        self._waiting = []
        return placements

    def in_order(self, layer: int) -> Tensor:
        """Where a layer's tokens lie now, in the order they are to have: int64 [N, T]."""
        kept = self.kept[layer]
        if not self._method.stores_by_worth:
            return kept.argsort(dim=-1)
        places = torch.arange(kept.shape[1], device=kept.device).expand(len(kept), -1)
        history = kept.shape[1] - self._method.window
        return torch.cat([places[:, :history].flip(1), places[:, history:]], dim=1)

    def stored(self) -> list[Tensor]:
        """Per layer its tokens once they lie :meth:`in_order`, int [N, T]."""
        return [kept.gather(1, self.in_order(layer)) for layer, kept in enumerate(self.kept)]

    def _local_counts(self, seen: int) -> IntArray:
        # Shapes are all that weights may look at, and those of later layers are the same.
        return page_budgets(
            self._method,
            [self._waiting[-1]] * self._num_layers,
            pages_per_layer=self.plan.arena_blocks,
            block_size=self.plan.block_size,
            lengths=self.plan.prompt_len,
            pinned=self._pinned_count,
        )[:seen]

    def _choose(self, scores: LayerScores, pages: int) -> Tensor:
        history = pages * self.plan.block_size - self._method.window
        if self._pinned is not None:
            places = self._pinned.expand(len(scores.tokens), -1)
            scores = replace(scores, tokens=rank_first(scores.tokens, places))
        chosen = self._method.select_layers([scores], [history])[0]
        ordered = by_worth(chosen, scores.tokens)
        return with_window(ordered, self.plan.prompt_len, self._method.window)

    def _shrink(self, layer: int, pages: int) -> None:
        given = len(self.tables[layer]) - pages
        if given < 0:
            raise RuntimeError(f"layer {layer} would grow from {pages - given} to {pages} pages")
        self._free.extend(self.tables[layer][:given].tolist())
        self.tables[layer] = self.tables[layer][given:]
        self.kept[layer] = self.kept[layer][:, given * self.plan.block_size :]

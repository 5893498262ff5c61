"""Makes cuts: score what a request holds, divide its arena, move the survivors.

A request's life in a worker: its prompt's last queries are collected (:mod:`.query_collector`);
at a cut :class:`Compressor` scores, selects and moves. A prompt that runs as a cascade is cut layer
by layer inside the step instead (:mod:`.cascade_prefill`).
"""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.eviction.cascade_prefill import CascadePrefill
from vllm_kvcompress.eviction.cut_reporter import CutReporter, PhaseTimer
from vllm_kvcompress.eviction.fallback import fallback_of, fallback_scores
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.request_scorer import HeldTokens, RequestScorer
from vllm_kvcompress.eviction.selection import Selection, select_survivors
from vllm_kvcompress.eviction.shared_cuts import DueCut, SharedCuts
from vllm_kvcompress.methods import LayerScores, Method, MethodError, to_numbers
from vllm_kvcompress.methods.faults import check_stats
from vllm_kvcompress.paging.arena import IntArray, PageArena, deal_pages
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.compression_schedule import Cut

_SOME_LENGTH = 2048
"""Tokens of a prompt for which kernels take their larger tiles."""


class Compressor:
    """Applies each request's method to it.

    Args:
        arena: Takes in the compressed request.
        codec: Reads and writes tokens of pages.
        layers: One entry per layer of the arena.
        reporter: Takes note of each cut.

    """

    def __init__(
        self,
        arena: PageArena,
        codec: PageCodec,
        layers: Sequence[AttentionParams],
        reporter: CutReporter,
    ) -> None:
        self._arena = arena
        self._codec = codec
        self._layers = layers
        self._reporter = reporter
        self._num_layers = len(layers)
        self._block_size = arena.geometry.block_size

        self._shared = SharedCuts(arena, codec, self._scorer, reporter)

    # --- after a step ----------------------------------------------------------------------------

    def cut_all(self, due: Sequence[DueCut]) -> None:
        """Make the next cuts of several requests, together where that saves launches.

        Mutates the requests, the arena, and pages of the requests' own blocks.

        Args:
            due: Each request once.

        Raises:
            ValueError: A request is never cut.

        """
        together = []
        for each in due:
            if not self._shared.takes(each.request):
                self.cut(each.request_id, each.request, each.windows)
                continue
            cut = each.request.next_cut
            if cut is None:
                raise ValueError(f"request {each.request_id} is never cut")
            held = self._held(each.request_id, each.request, cut, each.windows)
            together.append((each, held))
        for each, fault in self._shared.make(together):
            if not self.cut(each.request_id, each.request, each.windows):
                self._reporter.tell_of_neighbour(each.request_id, each.request, fault)

    def cut(
        self, request_id: str, request: WorkerRequest, windows: Tensor | None
    ) -> MethodError | None:
        """Make a request's next cut. Mutates the request, the arena, and pages of its own blocks.

        If the method fails, every layer keeps as many tokens as the others, the most recent ones.

        Args:
            request_id: The request's id.
            request: Its tokens up to the cut are computed.
            windows: Queries of the last tokens, [L, w, H, D]; None if the method looks at none.

        Returns:
            What the method has failed with; None if it has not.

        Raises:
            ValueError: It is never cut.

        """
        cut = request.next_cut
        if cut is None:
            raise ValueError(f"request {request_id} is never cut")
        timer = PhaseTimer({"score": request.score_seconds} if request.scores else {})
        held = self._held(request_id, request, cut, windows)
        fault = None
        if request.method.scorer.keeps_all:
            request.advance()
            pages = self._scatter(request, cut, held)
        else:
            selection, fault = self._select(request_id, request, cut, held, timer)
            pages = self._move(request, cut, held, selection)
        timer.lap("move")
        self._arena.drop(request_id)
        self._arena.admit(
            request_id,
            request.survivor_blocks(),
            pages,
            num_tokens=cut.position,
            slack=cut.slack,
            growth_column=request.tail_start,
        )
        self._reporter.note(request_id, request, cut, pages, timer.laps, fault)
        return fault

    def _held(
        self, request_id: str, request: WorkerRequest, cut: Cut, windows: Tensor | None
    ) -> HeldTokens:
        """What the layers hold before the cut: the arena's pages, or at first the blocks' own."""
        capacity = cut.blocks * self._block_size
        if request.cuts_made:
            lengths = self._arena.lengths(request_id, cut.position).tolist()
            return HeldTokens(self._arena.layer_pages(request_id), lengths, capacity, windows)
        blocks = request.blocks[: cdiv(cut.position, self._block_size)]
        pages = list(self._arena.geometry.all_pages(blocks))
        return HeldTokens(pages, [cut.position] * self._num_layers, capacity, windows)

    def _select(
        self,
        request_id: str,
        request: WorkerRequest,
        cut: Cut,
        held: HeldTokens,
        timer: PhaseTimer,
    ) -> tuple[Selection, MethodError | None]:
        """Choose the survivors, and put the cut behind the request."""
        heads = self._codec.num_kv_heads
        pinned = request.pinned_places(cut, held.lengths, heads)

        def choose(method: Method, scores: Sequence[LayerScores]) -> Selection:
            timer.lap("score")
            return select_survivors(
                method,
                scores,
                capacity=held.capacity,
                block_size=self._block_size,
                lengths=held.lengths,
                lap=timer.lap,
                pages=None if cut.moves else self._arena.dealt_pages(request_id),
                pinned=pinned,
            )

        fault = None
        try:
            scores = self._scores(request, held)
            selection = choose(request.method, scores)
        except MethodError as found:
            fault = found
            scores = fallback_scores(request.method, held.lengths, heads)
            selection = choose(fallback_of(request.method), scores)
        request.advance()
        self._reporter.record(
            request_id, request, cut, scores, selection.tokens, selection.weights, fault
        )
        request.follow_pinned(cut, pinned, selection.tokens, held.lengths)
        return selection, fault

    def _scores(self, request: WorkerRequest, held: HeldTokens) -> list[LayerScores]:
        if request.fault is not None:  # while the step ran
            raise request.fault
        if len(request.scores) == self._num_layers:  # scored while the step ran
            scores = [request.scores[layer] for layer in range(self._num_layers)]
        else:
            scores = self._scorer(request.method).score_all(held)
        numbers = to_numbers(scores)
        check_stats(request.method.name, numbers)
        return numbers

    def _move(
        self, request: WorkerRequest, cut: Cut, held: HeldTokens, selection: Selection
    ) -> list[IntArray]:
        """Copy the survivors to their pages; returns those per layer."""
        if cut.moves:
            pages = deal_pages(self._arena.geometry, request.survivor_blocks(), selection.pages)
            self._codec.move(held.pages, selection.tokens, pages)
            return pages
        pages = [own[:count] for own, count in zip(held.pages, selection.pages, strict=True)]
        for own, tokens, target in zip(held.pages, selection.tokens, pages, strict=True):
            self._codec.rewrite(own, tokens, target)
        return pages

    def _scatter(self, request: WorkerRequest, cut: Cut, held: HeldTokens) -> list[IntArray]:
        """Copy all pages to pages of foreign layers; returns those per layer."""
        counts: IntArray = np.full(self._num_layers, cut.blocks, dtype=np.int64)
        pages = deal_pages(self._arena.geometry, request.survivor_blocks(), counts, shuffle=True)
        self._codec.copy(np.concatenate(held.pages), np.concatenate(pages))
        return pages

    def _scorer(self, method: Method) -> RequestScorer:
        return RequestScorer(method, self._codec, self._layers)

    # --- within a step ---------------------------------------------------------------------------

    def score_in_step(self, layer: int, request: WorkerRequest, keys: Tensor) -> None:
        """Score a layer of a prompt that runs in one step, while its keys are at hand.

        Args:
            layer: Index in the arena.
            request: The request; mutated: its window is read, its scores are kept in it, or what
                the method failed with.
            keys: All the prompt's keys after RoPE, [N, S, D].

        Raises:
            ValueError: The request is never cut.

        """
        cut = request.next_cut
        if cut is None:
            raise ValueError("only requests that are cut are scored")
        if request.fault is not None:
            return
        start = time.perf_counter()
        held = HeldTokens(
            [], [cut.position] * self._num_layers, cut.blocks * self._block_size, request.window
        )
        scorer = self._scorer(request.method)
        try:
            request.scores[layer] = scorer.score_layer(held, layer, keys=keys)
        except MethodError as fault:
            request.fault = fault
        request.score_seconds += time.perf_counter() - start

    def begin_cascade(self, request_id: str, request: WorkerRequest) -> CascadePrefill:
        """Lay out a prompt that is compressed while it runs, and stage its tables. Mutates arena.

        Args:
            request_id: The request's id.
            request: The request; its blocks are cached ones, workspace and arena.

        """
        cascade = CascadePrefill(
            request_id,
            request,
            self._arena,
            self._codec,
            self._scorer(request.method),
            self._reporter,
        )
        self._arena.stage(request_id, cascade.sources)
        return cascade

    # --- before any request ----------------------------------------------------------------------

    def warm_up(
        self,
        methods: Iterable[Method],
        query_shape: Sequence[int],
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        """Choose tokens of prompts of several lengths by each method, and keep none.

        What is compiled on first use is compiled by it, and too little memory beside the pool
        shows at the start: the first method gets the longest prompt there can be. All prompts lie
        in the null block; nothing is mutated. A method that fails with their zeros is told of and
        may do well with a prompt.

        Args:
            methods: What requests can have (:mod:`~vllm_kvcompress.planning.possible_methods`).
            query_shape: [H, D] of the queries.
            dtype: Dtype of the queries.
            max_model_len: Tokens of the longest prompt.

        """
        for number, method in enumerate(methods):
            # The fewest tokens that a layer can keep are its window and a block.
            kept = (cdiv(method.window, self._block_size) + 1) * self._block_size
            longest = min(max_model_len, max(_SOME_LENGTH, kept + 1) if number else max_model_len)
            for first in sorted({min(kept + 1, longest), longest}):
                if first <= kept:
                    continue  # too short to be cut
                shape = (self._num_layers, method.window, *query_shape)
                window = torch.zeros(*shape, dtype=dtype, device=self._codec.device)
                self._choose(method, window, [first] * self._num_layers, kept)
                if first == kept + 1 < longest:  # layers as an earlier cut leaves them
                    unequal = [first + layer % 2 for layer in range(self._num_layers)]
                    even = np.full(self._num_layers, kept // self._block_size)
                    self._choose(method, window, unequal, kept, even)
        self._codec.warm_up()

    def _choose(
        self,
        method: Method,
        window: Tensor,
        lengths: list[int],
        kept: int,
        pages_kept: IntArray | None = None,
    ) -> None:
        """Choose tokens of a request in the null block."""
        pages = self._arena.geometry.all_pages([0] * cdiv(max(lengths), self._block_size))
        held = HeldTokens(list(pages), lengths, kept, window)
        try:
            select_survivors(
                method,
                to_numbers(self._scorer(method).score_all(held)),
                capacity=held.capacity,
                block_size=self._block_size,
                lengths=lengths,
                lap=PhaseTimer({}).lap,
                pages=pages_kept,
            )
        except MethodError as fault:
            self._reporter.tell_of_warm_up(method.name, fault)

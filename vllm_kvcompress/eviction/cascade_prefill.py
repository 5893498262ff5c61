"""A prompt that is cut layer by layer while it runs in one step."""

from collections.abc import Sequence

from torch import Tensor

from vllm_kvcompress.eviction.cut_reporter import CutReporter, PhaseTimer
from vllm_kvcompress.eviction.layerwise import LayerwiseEviction
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.request_scorer import HeldTokens, RequestScorer
from vllm_kvcompress.methods import LayerScores, MethodError
from vllm_kvcompress.paging.arena import IntArray, PageArena
from vllm_kvcompress.paging.page_codec import PageCodec


class CascadePrefill:
    """One prompt in one step: each layer is cut as soon as its attention has run.

    Args:
        request_id: The request's id.
        request: The request; its blocks are cached ones, workspace and arena.
        arena: Takes in the request once all layers are cut.
        codec: Reads and writes tokens of pages.
        scorer: Scores with the request's method.
        reporter: Takes note of the cut.

    Raises:
        ValueError: The request is not to run as a cascade.

    """

    def __init__(
        self,
        request_id: str,
        request: WorkerRequest,
        arena: PageArena,
        codec: PageCodec,
        scorer: RequestScorer,
        reporter: CutReporter,
    ) -> None:
        cut, prefill_blocks = request.next_cut, request.prefill_blocks
        if cut is None or prefill_blocks is None:
            raise ValueError(f"request {request_id} does not run as a cascade")
        self._request_id, self._request, self._cut = request_id, request, cut
        self._arena, self._codec, self._scorer = arena, codec, scorer
        self._reporter = reporter
        cached = request.computed // arena.geometry.block_size  # blocks from the prefix cache
        self._lengths = [cut.position] * arena.geometry.num_layers
        self._pinned = request.pinned_places(cut, self._lengths, codec.num_kv_heads)
        self._seconds: dict[str, float] = {}
        self._scores: list[LayerScores] = []
        self._eviction = LayerwiseEviction(
            request.method,
            arena.geometry,
            cut,
            cached=request.blocks[:cached],
            workspace=request.blocks[cached:prefill_blocks],
            arena=request.blocks[prefill_blocks : prefill_blocks + cut.blocks],
            layers_per_division=request.settings.planner.layers_per_division,
            pinned=self._pinned,
        )

    @property
    def sources(self) -> Sequence[IntArray]:
        """Per layer the flat ids of the pages where its tokens are while it runs, int64 [n]."""
        return self._eviction.sources

    def cut_layer(self, layer: int, keys: Tensor | None, values: Tensor | None = None) -> None:
        """Cut a layer whose attention has just run. Mutates this and the arena's pages.

        Args:
            layer: Index in the arena; layers come in order. The window's queries of it are taken.
            keys: All the prompt's keys after RoPE, [N, S, D]; None: read them from the pages.
            values: As keys.

        """
        timer = PhaseTimer(self._seconds)
        held = HeldTokens(
            self.sources,
            self._lengths,
            self._cut.blocks * self._arena.geometry.block_size,
            self._request.window,
        )
        scores = None if self._eviction.fault else self._score(held, layer, keys)
        timer.lap("score")
        if scores is None:
            placements = self._eviction.take_without_scores(self._codec.num_kv_heads)
        else:
            if self._reporter.records is not None:
                self._scores.append(scores)
            placements = self._eviction.take(scores)
        timer.lap("select")
        for place in placements:
            at_hand = (keys, values) if place.layer == layer else (None, None)
            self._codec.hold(self.sources[place.layer], place.tokens, place.pages, *at_hand)
        timer.lap("move")

    def _score(self, held: HeldTokens, layer: int, keys: Tensor | None) -> LayerScores | None:
        """Scores of a layer; None if the method has failed, after which it is not asked again."""
        try:
            if keys is not None:
                return self._scorer.score_layer(held, layer, keys=keys)
            return self._scorer.score_from_pages(held, layer)
        except MethodError as fault:
            self._eviction.fall_back(fault, self._codec.num_kv_heads)
            return None

    def finish(self) -> None:
        """Put survivors in their final order. Mutates request, arena and the arena's pages.

        Raises:
            RuntimeError: Some layer has not been cut.

        """
        request, cut, eviction = self._request, self._cut, self._eviction
        if not eviction.done:
            raise RuntimeError(
                f"request {self._request_id}: not all layers of its cascade were cut"
            )
        timer = PhaseTimer(self._seconds)
        # As if compressed after the step: the same numbers are added in the same order.
        orders = [eviction.in_order(layer) for layer in range(len(eviction.tables))]
        self._codec.settle(eviction.tables, orders)
        timer.lap("move")
        fault = eviction.fault
        if fault is not None:
            self._scores = []
        recorded = self._reporter.records is not None and (
            fault is not None or len(self._scores) == len(self._lengths)
        )
        # Nobody else asks, and it is work.
        stored = eviction.stored() if recorded or self._pinned is not None else []
        request.advance()
        if recorded:
            self._reporter.record(
                self._request_id, request, cut, self._scores, stored, eviction.weights, fault
            )
        request.follow_pinned(cut, self._pinned, stored, self._lengths)
        self._arena.drop(self._request_id)
        self._arena.admit(
            self._request_id,
            request.survivor_blocks(),
            eviction.tables,
            num_tokens=cut.position,
            slack=cut.slack,
            growth_column=request.tail_start,
        )
        self._reporter.note(self._request_id, request, cut, eviction.tables, timer.laps, fault)

"""Cuts of several requests after one step, in launches that they share.

On an accelerator a cut is a handful of small kernels, and launching them takes longer than running
them. So all layers of all requests that end in a step go through each of them at once. What each
request keeps does not depend on the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_kvcompress.eviction.apportionment import Floats
from vllm_kvcompress.eviction.cut_reporter import CutReporter, PhaseTimer
from vllm_kvcompress.eviction.layer_budgets import WEIGHING, page_division
from vllm_kvcompress.eviction.pinned_tokens import PinnedPlaces, rank_first
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.request_scorer import HeldTokens, RequestScorer
from vllm_kvcompress.methods import LayerScores, Method, MethodError, to_numbers
from vllm_kvcompress.methods.faults import check_stats, method_code
from vllm_kvcompress.paging.arena import IntArray, PageArena, deal_pages
from vllm_kvcompress.paging.page_codec import JobPages, PageCodec
from vllm_kvcompress.paging.strided_codec import SHARED_BYTES
from vllm_kvcompress.planning.compression_schedule import Cut


@dataclass(frozen=True)
class DueCut:
    """A cut that is to be made after a step.

    Attributes:
        request_id: The request's id.
        request: The request; its tokens up to the cut are computed.
        windows: Queries of its last tokens, [L, w, H, D]; None if the method looks at none.

    """

    request_id: str
    request: WorkerRequest
    windows: Tensor | None


@dataclass
class _Open:
    """A cut that is being made.

    Attributes:
        due: What is cut.
        cut: The cut.
        held: What its layers hold before.
        pinned: Where its pinned tokens lie, if it has any.
        scores: Of its layers.
        pages: Pages that each layer keeps, int64 [L]; None until they are known.
        weights: The allocator's, fp64 [L]; None if it was not asked.
        tables: Per layer the pages that it holds afterwards.
        fault: What the method has failed with; the cut is not made then.

    """

    due: DueCut
    cut: Cut
    held: HeldTokens
    pinned: PinnedPlaces | None
    pages: IntArray | None
    scores: list[LayerScores] = field(default_factory=list)
    weights: Floats | None = None
    tables: list[IntArray] = field(default_factory=list)
    fault: MethodError | None = None

    @property
    def method(self) -> Method:
        return self.due.request.method


class SharedCuts:
    """Makes cuts of requests that choose tokens by their scores alone.

    Args:
        arena: Takes in the compressed requests.
        codec: Reads and writes tokens of pages; shares launches.
        scorer: Returns what scores with a method.
        reporter: Takes note of each cut.

    """

    def __init__(
        self,
        arena: PageArena,
        codec: PageCodec,
        scorer: Callable[[Method], RequestScorer],
        reporter: CutReporter,
    ) -> None:
        self._arena, self._codec, self._scorer = arena, codec, scorer
        self._reporter = reporter
        self._block_size = arena.geometry.block_size

    def takes(self, request: WorkerRequest) -> bool:
        """Whether a request's next cut can be made here."""
        scorer = request.method.scorer
        return (
            self._codec.shares_launches
            and not scorer.keeps_all
            and not scorer.selects_itself
            and not scorer.stores_by_worth
            and not request.scores
        )

    def make(self, due: Sequence[tuple[DueCut, HeldTokens]]) -> list[tuple[DueCut, MethodError]]:
        """Make cuts. Mutates the requests, the arena, and pages of the requests' own blocks.

        Args:
            due: Cuts of requests that :meth:`takes` takes, and what their layers hold.

        Returns:
            Those that could not be made, and why: their method has failed, for them or for another
            request in the same call. Nothing of them has changed, and each is to be tried alone.

        """
        return [left for group in self._groups(due) for left in self._make(group)]

    def _groups(
        self, due: Sequence[tuple[DueCut, HeldTokens]]
    ) -> Iterator[Sequence[tuple[DueCut, HeldTokens]]]:
        """As many cuts at one time as there is memory for their scores."""
        group: list[tuple[DueCut, HeldTokens]] = []
        taken = 0
        for each in due:
            size = 4 * self._codec.num_kv_heads * sum(each[1].lengths)
            if group and taken + size > SHARED_BYTES:
                yield group
                group, taken = [], 0
            group.append(each)
            taken += size
        if group:
            yield group

    def _make(self, due: Sequence[tuple[DueCut, HeldTokens]]) -> list[tuple[DueCut, MethodError]]:
        timer = PhaseTimer({})
        cuts = [self._open(each, held) for each, held in due]
        # Those that move come first, and equal methods side by side.
        cuts.sort(key=lambda c: (not c.cut.moves, c.method.name, repr(c.method)))
        jobs, first = self._jobs(cuts), 0
        for same in _same_method(cuts):
            stop = first + sum(len(cut.held.pages) for cut in same)
            scorer = self._scorer(same[0].method)
            found = scorer.score_together([cut.held for cut in same], jobs.part(first, stop))
            for cut, scores in zip(same, found, strict=True):
                if isinstance(scores, MethodError):
                    cut.fault = scores
                else:
                    cut.scores = scores
            first = stop
        self._to_numbers([cut for cut in cuts if cut.cut.moves and not cut.fault])
        timer.lap("score")
        for same in _same_method([cut for cut in cuts if cut.cut.moves and not cut.fault]):
            self._divide(same)
        timer.lap("allocate")
        ready = [cut for cut in cuts if not cut.fault]
        if ready and len(ready) < len(cuts):
            jobs = self._jobs(ready)
        made = self._finish(ready, jobs, timer) if ready else {}
        for each, _ in due:
            if each.request_id in made:
                self._close(*made[each.request_id])
        return [(cut.due, cut.fault) for cut in cuts if cut.fault]

    def _jobs(self, cuts: Sequence[_Open]) -> JobPages:
        """Open the pages of all layers of some cuts."""
        pages = [own for cut in cuts for own in cut.held.pages]
        return self._codec.open(pages, [length for cut in cuts for length in cut.held.lengths])

    def _finish(
        self, cuts: Sequence[_Open], jobs: JobPages, timer: PhaseTimer
    ) -> dict[str, tuple[_Open, list[Tensor], dict[str, float]]]:
        """Select and move what is divided; returns what :meth:`_close` takes, by request."""
        for cut in cuts:
            self._deal(cut)
        size = self._block_size
        kept = self._codec.keep_best(
            jobs,
            [worth for cut in cuts for worth in _worths(cut)],
            [len(table) * size - cut.method.window for cut in cuts for table in cut.tables],
            [cut.method.window for cut in cuts for _ in cut.scores],
            [table if cut.cut.moves else None for cut in cuts for table in cut.tables],
        )
        timer.lap("move")
        laps = {phase: seconds / len(cuts) for phase, seconds in timer.laps.items()}
        tokens = iter(kept)
        return {cut.due.request_id: (cut, [next(tokens) for _ in cut.scores], laps) for cut in cuts}

    def _open(self, due: DueCut, held: HeldTokens) -> _Open:
        cut = due.request.next_cut
        assert cut is not None
        return _Open(
            due=due,
            cut=cut,
            held=held,
            pinned=due.request.pinned_places(cut, held.lengths, self._codec.num_kv_heads),
            pages=None if cut.moves else self._arena.dealt_pages(due.request_id),
        )

    def _to_numbers(self, cuts: Sequence[_Open]) -> None:
        """Fetch what the allocators read, of all requests in one transfer, and look at it."""
        numbers = iter(to_numbers([scores for cut in cuts for scores in cut.scores]))
        for cut in cuts:
            cut.scores = [next(numbers) for _ in cut.scores]
            try:
                check_stats(cut.method.name, cut.scores)
            except MethodError as fault:
                cut.fault = fault

    def _divide(self, cuts: Sequence[_Open]) -> None:
        """Divide the pools of requests with one method; one call of it serves all of them."""
        method, layers = cuts[0].method, self._arena.geometry.num_layers
        try:
            divisions = [
                page_division(
                    method,
                    num_layers=layers,
                    pages_per_layer=cut.held.capacity // self._block_size,
                    block_size=self._block_size,
                    lengths=cut.held.lengths,
                    pinned=cut.pinned.count if cut.pinned else 0,
                )
                for cut in cuts
            ]
            staged = [d.staged(cut.scores) for d, cut in zip(divisions, cuts, strict=True)]
            with method_code(method.name, WEIGHING):
                weights = method.allocator.weights_by_stage(staged, num_layers=layers)
                found = list(zip(cuts, divisions, staged, weights, strict=True))
        except MethodError as fault:
            for cut in cuts:
                cut.fault = fault
            return
        for cut, division, stages, own in found:
            try:
                cut.pages, cut.weights = division.divide_by(stages, own), division.weights
            except MethodError as fault:
                cut.fault = fault

    def _deal(self, cut: _Open) -> None:
        """Put the cut behind the request, and find its layers' pages."""
        request, pages = cut.due.request, cut.pages
        assert pages is not None
        request.advance()
        if cut.cut.moves:
            geometry = self._arena.geometry
            cut.tables = deal_pages(geometry, request.survivor_blocks(), pages)
        else:
            held = zip(cut.held.pages, pages, strict=True)
            cut.tables = [own[:count] for own, count in held]

    def _close(self, cut: _Open, tokens: list[Tensor], laps: dict[str, float]) -> None:
        """Tell arena, request and reporter."""
        name, request = cut.due.request_id, cut.due.request
        self._reporter.record(name, request, cut.cut, cut.scores, tokens, cut.weights)
        request.follow_pinned(cut.cut, cut.pinned, tokens, cut.held.lengths)
        self._arena.drop(name)
        self._arena.admit(
            name,
            request.survivor_blocks(),
            cut.tables,
            num_tokens=cut.cut.position,
            slack=cut.cut.slack,
            growth_column=request.tail_start,
        )
        self._reporter.note(name, request, cut.cut, cut.tables, laps)


def _same_method(cuts: Sequence[_Open]) -> list[list[_Open]]:
    """Neighbours with one method."""
    groups: list[list[_Open]] = []
    for cut in cuts:
        if groups and groups[-1][-1].method == cut.method:
            groups[-1].append(cut)
        else:
            groups.append([cut])
    return groups


def _worths(cut: _Open) -> list[Tensor]:
    """Scores of the layers, those of pinned tokens above all others."""
    worths = [scores.tokens for scores in cut.scores]
    if cut.pinned is None:
        return worths
    return [rank_first(w, p) for w, p in zip(worths, cut.pinned.places, strict=True)]

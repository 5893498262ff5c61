"""Makes the cuts: score what a request holds, divide its arena, move the survivors."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_kvcompress.eviction.layerwise import LayerwiseEviction
from vllm_kvcompress.eviction.measurements import Report
from vllm_kvcompress.eviction.records import CutRecord, make_record
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.scorer import HeldTokens, LayerScorer
from vllm_kvcompress.eviction.selection import PinnedPlaces, select_survivors
from vllm_kvcompress.methods import LayerScores, to_numbers
from vllm_kvcompress.paging.arena import ArenaPlan, IntArray, PageArena, deal_pages
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.compression_schedule import Cut
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.pinned_ranges import ids_between
from vllm_kvcompress.planning.request_settings import SettingsResolver

logger = init_logger("vllm.kvcompress.compressor")


@dataclass
class RunningCascade:
    """One prompt that is compressed while it runs.

    Attributes:
        layers: Its division so far.
        scorer: Scores them.
        seconds: Time spent so far, by phase.
        scores: Of the layers so far, if a record is to be made.

    """

    layers: LayerwiseEviction
    scorer: LayerScorer
    seconds: dict[str, float] = field(default_factory=dict)
    scores: list[LayerScores] = field(default_factory=list)


class Compressor:
    """Applies each request's method to it, one request at a time.

    Args:
        config: The engine's settings.
        arena: Takes in the compressed request.
        codec: Reads and writes tokens of pages.
        layers: One entry per layer of the arena.

    Attributes:
        seconds: Time spent so far, by phase.
        records: Descriptions of compressions, appended to; None: none are made.
        report: What has been measured; whoever takes it away leaves a new one.

    """

    def __init__(
        self,
        config: KVCompressionConfig,
        arena: PageArena,
        codec: PageCodec,
        layers: Sequence[AttentionParams],
    ) -> None:
        self._config = config
        self._arena = arena
        self._codec = codec
        self._layers = layers
        self._num_layers = len(layers)
        self.seconds: dict[str, float] = {}
        self.records: list[CutRecord] | None = None
        self.report = Report()

    # --- after a step ----------------------------------------------------------------------------

    def cut(self, request_id: str, request: WorkerRequest, windows: Tensor | None) -> None:
        """Make a request's next cut. Mutates its entry, the arena, and pages of its own blocks.

        Args:
            request_id: The request.
            entry: Its tokens up to the cut are computed.
            windows: Queries of the last tokens, [L, w, H, D]; None if the method looks at none.

        """
        cut, plan, held = self._next_cut(request_id, request, windows)
        method, scores = request.settings.planner.method, request.scores
        clock = PhaseTimer({"score": request.score_seconds} if scores else {})
        ready = len(scores) == self._num_layers
        given = [scores[layer] for layer in range(self._num_layers)] if ready else None
        dealt = self._arena.dealt_pages(request_id) if request_id in self._arena else None
        counts: IntArray = np.full(self._num_layers, cut.blocks, dtype=np.int64)
        kept: list[Tensor] = []
        pinned = self._pinned(request, cut, held)
        if not method.keeps_all:
            scorer = self._scorer(request.settings.planner)
            found = to_numbers(scorer.score_all(held) if given is None else given)
            clock.lap("score")
            counts, kept = select_survivors(
                method,
                found,
                capacity=held.capacity,
                block_size=plan.block_size,
                lengths=held.lengths,
                lap=clock.lap,
                dealt=None if cut.moves else dealt,
                pinned=pinned,
            )
            if self.records is not None:
                self._record(request_id, request, plan, found, kept)
        request.advance()
        if pinned is not None:
            self._follow(request, cut, pinned, kept, held.lengths)
        blocks = request.survivor_blocks()
        if method.keeps_all:
            pages = deal_pages(self._arena.geometry, blocks, counts, shuffle=True)
            self._codec.copy(np.concatenate(held.pages), np.concatenate(pages))
        elif cut.moves:
            pages = deal_pages(self._arena.geometry, blocks, counts)
            self._codec.move(held.pages, kept, pages)
        else:
            pages = [own[:count] for own, count in zip(held.pages, counts, strict=True)]
            for own, tokens, target in zip(held.pages, kept, pages, strict=True):
                self._codec.rewrite(own, tokens, target)
        clock.lap("move")
        self._admit(request_id, request, plan, pages)
        self._note(request_id, request, plan, counts, clock)

    def _next_cut(
        self, request_id: str, request: WorkerRequest, windows: Tensor | None
    ) -> tuple[Cut, ArenaPlan, HeldTokens]:
        if request.schedule is None:
            raise ValueError(f"request {request_id} is never cut")
        cut = request.schedule.cut(request.cuts_made + 1)
        size = request.schedule.block_size
        plan = ArenaPlan(cut.position, size, -(-cut.position // size), cut.blocks, cut.slack)
        pages: list[IntArray]
        if request.cuts_made:
            pages = self._arena.layer_pages(request_id)
            lengths = self._arena.lengths(request_id, cut.position).tolist()
        else:
            pages = list(self._arena.geometry.all_pages(request.blocks[: plan.prompt_blocks]))
            lengths = [cut.position] * self._num_layers
        return cut, plan, HeldTokens(pages, lengths, cut.blocks * size, windows)

    def _scorer(self, planner: BlockPlanner) -> LayerScorer:
        return LayerScorer(planner.method, self._codec, self._layers)

    def _pinned(self, request: WorkerRequest, cut: Cut, held: HeldTokens) -> PinnedPlaces | None:
        if request.pinned_tokens is None:
            return None
        places = [
            request.pinned_tokens.find(layer, cut.position, length, self._codec.num_kv_heads)
            for layer, length in enumerate(held.lengths)
        ]
        return PinnedPlaces(places, request.settings.pinned_count(request.prompt_len))

    def _follow(
        self,
        request: WorkerRequest,
        cut: Cut,
        pinned: PinnedPlaces,
        stored: Sequence[Tensor],
        held: Sequence[int],
    ) -> None:
        assert request.schedule is not None
        if (
            request.pinned_tokens is not None
            and stored
            and request.schedule.has_cut(request.cuts_made + 1)
        ):
            request.pinned_tokens.follow(cut.position, pinned.places, stored, held)

    def _admit(
        self, request_id: str, request: WorkerRequest, plan: ArenaPlan, pages: Sequence[IntArray]
    ) -> None:
        self._arena.drop(request_id)
        self._arena.admit(request_id, plan, request.survivor_blocks(), pages, request.tail_start)

    # --- within a step ---------------------------------------------------------------------------

    def score_in_step(self, layer: int, request: WorkerRequest, keys: Tensor) -> None:
        """Score a layer of a prompt that runs in one step, while its keys are at hand.

        Args:
            layer: Index in the arena.
            entry: The request; mutated: its window is read, its scores are kept in it.
            keys: All the prompt's keys after RoPE, [N, S, D].

        """
        planner = request.settings.planner
        plan = planner.plan(request.prompt_len)
        if plan is None:
            raise ValueError("only requests with a plan are scored")
        start = time.perf_counter()
        held = self._held_in_step(plan, request, [])
        request.scores[layer] = self._scorer(planner).score_keys(held, layer, keys)
        request.score_seconds += time.perf_counter() - start

    def begin_cascade(self, request: WorkerRequest) -> RunningCascade:
        """Lay out a prompt that is compressed while it runs. No page is touched.

        Args:
            entry: The request; its blocks are cached ones, workspace and arena.

        """
        planner = request.settings.planner
        plan = planner.plan(request.prompt_len)
        if plan is None or request.prefill_blocks is None:
            raise ValueError("only requests with a plan and a workspace run as a cascade")
        keep = request.settings.pinned_ranges
        layers = LayerwiseEviction(
            planner.method,
            self._arena.geometry,
            plan,
            cached=request.blocks[: request.cached],
            workspace=request.blocks[request.cached : request.prefill_blocks],
            arena=request.blocks[
                request.prefill_blocks : request.prefill_blocks + plan.arena_blocks
            ],
            layers_per_division=planner.layers_per_division,
            pinned=ids_between(keep, 0, request.prompt_len) if keep else None,
            pinned_count=request.settings.pinned_count(request.prompt_len),
        )
        return RunningCascade(layers, self._scorer(planner))

    def cascade(
        self, run: RunningCascade, layer: int, request: WorkerRequest, keys: Tensor | None
    ) -> None:
        """Cut a layer whose attention has just run. Mutates the run and the arena's pages.

        Args:
            run: The request's.
            layer: Index in the arena; layers come in order.
            entry: The request, its window's queries of this layer taken.
            keys: All the prompt's keys after RoPE, [N, S, D]; None: read them from the pages.

        """
        clock = PhaseTimer(run.seconds)
        held = self._held_in_step(run.layers.plan, request, run.layers.sources)
        if keys is not None:
            scores = run.scorer.score_keys(held, layer, keys)
        else:
            (scores,) = run.scorer.score_some(held, range(layer, layer + 1))
        clock.lap("score")
        if self.records is not None:
            run.scores.append(scores)
        placements = run.layers.take(scores)
        clock.lap("select")
        if placements:
            self._codec.move(
                [run.layers.sources[p.layer] for p in placements],
                [p.tokens for p in placements],
                [p.pages for p in placements],
            )
        clock.lap("move")

    def finish_cascade(self, request_id: str, request: WorkerRequest, run: RunningCascade) -> None:
        """Put survivors in their final order. Mutates entry, arena and the arena's pages."""
        if not run.layers.done:
            raise RuntimeError(f"request {request_id}: not all layers of its cascade were cut")
        clock = PhaseTimer(run.seconds)
        for layer, pages in enumerate(run.layers.tables):
            # As if compressed after the step: the same numbers are added in the same order.
            self._codec.rewrite(pages, run.layers.in_order(layer), pages)
        clock.lap("move")
        plan, stored = run.layers.plan, []
        if run.scores or request.pinned_tokens is not None:  # nobody else asks, and it is work
            stored = run.layers.stored()
        if len(run.scores) == self._num_layers:
            self._record(request_id, request, plan, run.scores, stored)
        cut, held = Cut(plan.prompt_len, plan.arena_blocks), [plan.prompt_len] * self._num_layers
        pinned = self._pinned(request, cut, self._held_in_step(plan, request, []))
        request.advance()
        if pinned is not None:
            self._follow(request, cut, pinned, stored, held)
        self._admit(request_id, request, plan, run.layers.tables)
        counts = np.asarray([len(pages) for pages in run.layers.tables], dtype=np.int64)
        self._note(request_id, request, run.layers.plan, counts, clock)

    def _held_in_step(
        self, plan: ArenaPlan, request: WorkerRequest, pages: Sequence[IntArray]
    ) -> HeldTokens:
        return HeldTokens(
            pages,
            [plan.prompt_len] * self._num_layers,
            plan.arena_blocks * plan.block_size,
            request.window,
        )

    # --- before any request ----------------------------------------------------------------------

    def warm_up(
        self,
        resolver: SettingsResolver,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        """Choose tokens of the shortest and the longest prompt there can be, and keep none.

        What is compiled on first use is compiled by it, and too little memory beside the pool
        shows at the start. Both prompts lie in the null block; nothing is mutated.

        Args:
            plans: Of the engine.
            query_shape: [H, D] of the queries.
            dtype: Of the queries.
            max_model_len: Tokens of the longest prompt.

        """
        planner = resolver.default_planner
        shape = (self._num_layers, planner.window, *query_shape)
        found = (planner.plan(n) for n in range(planner.window + 1, max_model_len + 1))
        shortest = next((plan for plan in found if plan), None)
        if planner.keeps_all or shortest is None:
            return
        window = torch.zeros(*shape, dtype=dtype, device=self._codec.device)
        for plan in (shortest, planner.plan(max_model_len)):
            if plan is not None:
                pages = self._arena.geometry.all_pages([0] * plan.prompt_blocks)
                capacity = plan.arena_blocks * plan.block_size
                lengths = [plan.prompt_len] * self._num_layers
                held = HeldTokens(list(pages), lengths, capacity, window)
                scores = to_numbers(self._scorer(planner).score_all(held))
                select_survivors(
                    planner.method,
                    scores,
                    capacity=capacity,
                    block_size=plan.block_size,
                    lengths=lengths,
                    lap=PhaseTimer({}).lap,
                )
        self._codec.warm_up()

    # --- records ---------------------------------------------------------------------------------

    def _record(
        self,
        request_id: str,
        request: WorkerRequest,
        plan: ArenaPlan,
        found: Sequence[LayerScores],
        kept: Sequence[Tensor],
    ) -> None:
        assert self.records is not None
        self.records.append(
            make_record(
                request.settings.planner.method,
                found,
                kept,
                request_id=request_id,
                number=request.cuts_made + 1,
                prompt_len=plan.prompt_len,
                block_size=plan.block_size,
                capacity=plan.arena_blocks * plan.block_size,
            )
        )

    def _note(
        self,
        request_id: str,
        request: WorkerRequest,
        plan: ArenaPlan,
        counts: IntArray,
        clock: "PhaseTimer",
    ) -> None:
        for phase, seconds in clock.laps.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.report.laps.append((phase, round(seconds * 1e6)))
        name, tokens = request.settings.planner.method.name, counts * plan.block_size - plan.slack
        if request.schedule is not None and request.schedule.kind(request.cuts_made) == "prompt":
            self.report.counts[f"seen:{name}"] += plan.prompt_len
            self.report.counts[f"kept:{name}"] += int(tokens.sum()) // self._num_layers
            for layer, kept in enumerate(tokens.tolist()):
                self.report.counts[f"layer:{layer}"] += kept
        if not self._config.log_requests:
            return
        facts = {
            "request": request_id,
            "method": name,
            "cut": request.cuts_made,
            "cascade": request.prefill_blocks is not None and request.cuts_made == 1,
            "prompt_tokens": request.prompt_len,
            "text_tokens": plan.prompt_len,
            "block_size": plan.block_size,
            "blocks_before": plan.prompt_blocks,
            "blocks_after": plan.arena_blocks,
            "pages_per_layer": counts.tolist(),
            "tokens_per_layer": tokens.tolist(),
            "seconds": {k: round(v, 4) for k, v in clock.laps.items()},
        }
        logger.info("KVCOMPRESS %s", json.dumps(facts))


class PhaseTimer:
    """Seconds by phase."""

    def __init__(self, laps: dict[str, float]) -> None:
        self.laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

"""Makes the cuts: score what a request holds, divide its arena, move the survivors."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_kvcompress.allocation import page_budgets
from vllm_kvcompress.arena import ArenaPlan, IntArray, PageArena, deal_pages
from vllm_kvcompress.cascade import LayerCascade
from vllm_kvcompress.course import Cut
from vllm_kvcompress.engine.codec import PageCodec
from vllm_kvcompress.engine.facts import LayerFacts
from vllm_kvcompress.engine.ledger import Entry
from vllm_kvcompress.engine.scorer import Held, Scorer
from vllm_kvcompress.methods import LayerScores, settled
from vllm_kvcompress.planner import Planner
from vllm_kvcompress.survivors import by_worth, with_window

logger = init_logger("vllm.kvcompress.compressor")


@dataclass
class CascadeRun:
    """One prompt that is compressed while it runs.

    Attributes:
        layers: Its division so far.
        seconds: Time spent so far, by phase.

    """

    layers: LayerCascade
    seconds: dict[str, float] = field(default_factory=dict)


class Compressor:
    """Applies the engine's method to one request at a time.

    Args:
        planner: Shared with the scheduler.
        arena: Takes in the compressed request.
        codec: Reads and writes tokens of pages.
        layers: One entry per layer of the arena.

    Attributes:
        needs_queries: Whether the method looks at the window's queries.
        seconds: Time spent so far, by phase.

    """

    def __init__(
        self,
        planner: Planner,
        arena: PageArena,
        codec: PageCodec,
        layers: Sequence[LayerFacts],
    ) -> None:
        self._planner = planner
        self._config = planner.config
        self._method = planner.config.build_method()
        self._arena = arena
        self._codec = codec
        self._num_layers = len(layers)
        self._scorer = Scorer(self._method, codec, layers)
        self.needs_queries = self._scorer.needs_queries
        self.seconds: dict[str, float] = {}

    # --- after a step ----------------------------------------------------------------------------

    def cut(self, request_id: str, entry: Entry, windows: Tensor | None) -> None:
        """Make a request's next cut. Mutates its entry, the arena, and pages of its own blocks.

        Args:
            request_id: The request.
            entry: Its tokens up to the cut are computed.
            windows: Queries of the last tokens, [L, w, H, D]; None if the method looks at none.

        """
        cut, plan, held = self._next_cut(request_id, entry, windows)
        scores = entry.scores
        clock = _Clock({"score": entry.score_seconds} if scores else {})
        ready = len(scores) == self._num_layers
        given = [scores[layer] for layer in range(self._num_layers)] if ready else None
        dealt = self._arena.dealt_pages(request_id) if request_id in self._arena else None
        if self._method.keeps_all:
            counts: IntArray = np.full(self._num_layers, cut.blocks, dtype=np.int64)
            kept: list[Tensor] = []
        else:
            counts, kept = self._choose(held, None if cut.moves else dealt, clock, given)
        entry.advance()
        blocks = entry.home_blocks()
        if self._method.keeps_all:
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
        self._admit(request_id, entry, plan, pages)
        self._note(request_id, entry, plan, counts, clock)

    def _next_cut(
        self, request_id: str, entry: Entry, windows: Tensor | None
    ) -> tuple[Cut, ArenaPlan, Held]:
        if entry.course is None:
            raise ValueError(f"request {request_id} is never cut")
        cut = entry.course.cut(entry.cuts + 1)
        size = entry.course.block_size
        plan = ArenaPlan(cut.position, size, -(-cut.position // size), cut.blocks, cut.slack)
        pages: list[IntArray]
        if entry.cuts:
            pages = self._arena.layer_pages(request_id)
            lengths = self._arena.lengths(request_id, cut.position).tolist()
        else:
            pages = list(self._arena.geometry.all_pages(entry.blocks[: plan.prompt_blocks]))
            lengths = [cut.position] * self._num_layers
        return cut, plan, Held(pages, lengths, cut.blocks * size, windows)

    def _choose(
        self,
        held: Held,
        dealt: IntArray | None,
        clock: "_Clock",
        scores: Sequence[LayerScores] | None = None,
    ) -> tuple[IntArray, list[Tensor]]:
        """Return pages per layer, int64 [L], and the tokens that each layer keeps, int [N, T_l].

        ``dealt``: pages per layer if they shall stay as they are.
        """
        found = settled(self._scorer.score_all(held) if scores is None else scores)
        clock.lap("score")
        counts, size = dealt, self._planner.block_size
        if counts is None:
            counts = page_budgets(
                self._method,
                found,
                pages_per_layer=held.capacity // size,
                block_size=size,
                lengths=held.lengths,
            )
        clock.lap("allocate")
        window = self._method.window
        history = (counts * size - window).tolist()
        chosen = self._method.select_layers(found, history)
        if self._method.stores_by_worth:
            chosen = [by_worth(ids, s.tokens).flip(1) for ids, s in zip(chosen, found, strict=True)]
        kept = [
            with_window(ids, length, window)
            for ids, length in zip(chosen, held.lengths, strict=True)
        ]
        clock.lap("select")
        return counts, kept

    def _admit(
        self, request_id: str, entry: Entry, plan: ArenaPlan, pages: Sequence[IntArray]
    ) -> None:
        self._arena.drop(request_id)
        self._arena.admit(request_id, plan, entry.home_blocks(), pages, entry.growth)

    # --- within a step ---------------------------------------------------------------------------

    def score_in_step(self, layer: int, entry: Entry, keys: Tensor) -> None:
        """Score a layer of a prompt that runs in one step, while its keys are at hand.

        Args:
            layer: Index in the arena.
            entry: The request; mutated: its window is read, its scores are kept in it.
            keys: All the prompt's keys after RoPE, [N, S, D].

        """
        plan = self._planner.plan(entry.prompt_len)
        if plan is None:
            raise ValueError("only requests with a plan are scored")
        start = time.perf_counter()
        held = self._held_in_step(plan, entry, [])
        entry.scores[layer] = self._scorer.score_keys(held, layer, keys)
        entry.score_seconds += time.perf_counter() - start

    def begin_cascade(self, entry: Entry) -> CascadeRun:
        """Lay out a prompt that is compressed while it runs. No page is touched.

        Args:
            entry: The request; its blocks are cached ones, workspace and arena.

        """
        plan = self._planner.plan(entry.prompt_len)
        if plan is None or entry.front is None:
            raise ValueError("only requests with a plan and a workspace run as a cascade")
        layers = LayerCascade(
            self._method,
            self._arena.geometry,
            plan,
            cached=entry.blocks[: entry.cached],
            workspace=entry.blocks[entry.cached : entry.front],
            arena=entry.blocks[entry.front : entry.front + plan.arena_blocks],
            layers_at_once=self._planner.layers_at_once,
        )
        return CascadeRun(layers)

    def cascade(self, run: CascadeRun, layer: int, entry: Entry, keys: Tensor | None) -> None:
        """Cut a layer whose attention has just run. Mutates the run and the arena's pages.

        Args:
            run: The request's.
            layer: Index in the arena; layers come in order.
            entry: The request, its window's queries of this layer taken.
            keys: All the prompt's keys after RoPE, [N, S, D]; None: read them from the pages.

        """
        clock = _Clock(run.seconds)
        held = self._held_in_step(run.layers.plan, entry, run.layers.sources)
        if keys is not None:
            scores = self._scorer.score_keys(held, layer, keys)
        else:
            (scores,) = self._scorer.score_some(held, range(layer, layer + 1))
        clock.lap("score")
        placements = run.layers.take(scores)
        clock.lap("select")
        if placements:
            self._codec.move(
                [run.layers.sources[p.layer] for p in placements],
                [p.tokens for p in placements],
                [p.pages for p in placements],
            )
        clock.lap("move")

    def finish_cascade(self, request_id: str, entry: Entry, run: CascadeRun) -> None:
        """Put survivors in their final order. Mutates entry, arena and the arena's pages."""
        if not run.layers.done:
            raise RuntimeError(f"request {request_id}: not all layers of its cascade were cut")
        clock = _Clock(run.seconds)
        for layer, pages in enumerate(run.layers.tables):
            # As if compressed after the step: the same numbers are added in the same order.
            self._codec.rewrite(pages, run.layers.in_order(layer), pages)
        clock.lap("move")
        entry.advance()
        self._admit(request_id, entry, run.layers.plan, run.layers.tables)
        counts = np.asarray([len(pages) for pages in run.layers.tables], dtype=np.int64)
        self._note(request_id, entry, run.layers.plan, counts, clock)

    def _held_in_step(self, plan: ArenaPlan, entry: Entry, pages: Sequence[IntArray]) -> Held:
        return Held(
            pages,
            [plan.prompt_len] * self._num_layers,
            plan.arena_blocks * plan.block_size,
            entry.window if self.needs_queries else None,
        )

    # --- before any request ----------------------------------------------------------------------

    def warm_up(self, window_shape: Sequence[int], dtype: torch.dtype, max_model_len: int) -> None:
        """Choose tokens of the shortest and the longest prompt there can be, and keep none.

        What is compiled on first use is compiled by it, and too little memory beside the pool
        shows at the start. Both prompts lie in the null block; nothing is mutated.

        Args:
            window_shape: [L, w, H, D] of the queries.
            dtype: Of the queries.
            max_model_len: Tokens of the longest prompt.

        """
        plans = (self._planner.plan(n) for n in range(self._planner.window + 1, max_model_len + 1))
        shortest = next((plan for plan in plans if plan), None)
        if self._method.keeps_all or shortest is None:
            return
        window = torch.zeros(*window_shape, dtype=dtype, device=self._codec.device)
        for plan in (shortest, self._planner.plan(max_model_len)):
            if plan is not None:
                entry = Entry(plan.prompt_len, None, [], 0, window=window)
                pages = self._arena.geometry.all_pages([0] * plan.prompt_blocks)
                self._choose(self._held_in_step(plan, entry, list(pages)), None, _Clock({}))
        self._codec.warm_up()

    # --- records ---------------------------------------------------------------------------------

    def _note(
        self, request_id: str, entry: Entry, plan: ArenaPlan, counts: IntArray, clock: "_Clock"
    ) -> None:
        for phase, seconds in clock.laps.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if not self._config.log_requests:
            return
        facts = {
            "request": request_id,
            "method": self._config.method,
            "cut": entry.cuts,
            "cascade": entry.front is not None and entry.cuts == 1,
            "prompt_tokens": entry.prompt_len,
            "text_tokens": plan.prompt_len,
            "block_size": plan.block_size,
            "blocks_before": plan.prompt_blocks,
            "blocks_after": plan.arena_blocks,
            "pages_per_layer": counts.tolist(),
            "tokens_per_layer": (counts * plan.block_size - plan.slack).tolist(),
            "seconds": {k: round(v, 4) for k, v in clock.laps.items()},
        }
        logger.info("KVCOMPRESS %s", json.dumps(facts))


class _Clock:
    """Seconds by phase."""

    def __init__(self, laps: dict[str, float]) -> None:
        self.laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

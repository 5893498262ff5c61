"""The prefill hook: score a finished prompt, divide its arena, move the survivors."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvcompress_kernels.scoring import WindowStatistics
from vllm_kvcompress.allocation import page_budgets
from vllm_kvcompress.arena import ArenaPlan, IntArray, PageArena, deal_pages
from vllm_kvcompress.config import Planner
from vllm_kvcompress.engine.codec import PageCodec
from vllm_kvcompress.engine.facts import LayerFacts
from vllm_kvcompress.engine.ledger import Entry
from vllm_kvcompress.methods import LayerInput, LayerScores, Need, settled
from vllm_kvcompress.survivors import with_window

logger = init_logger("vllm.kvcompress.compressor")


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
        self._layers = layers
        self.needs_queries = Need.WINDOW_QUERIES in self._method.needs
        self.seconds: dict[str, float] = {}

    def compress(self, request_id: str, entry: Entry) -> None:
        """Fill the request's arena from its prompt's blocks. Writes its arena's pages only.

        Args:
            request_id: The request.
            entry: Its prompt is complete in its prompt blocks, its window is collected.

        """
        plan = entry.plan
        if plan is None:
            raise ValueError(f"request {request_id} has no plan")
        blocks = entry.private_blocks()[: plan.arena_blocks]
        sources = self._sources(plan, entry)
        clock = _Clock({"score": entry.score_seconds} if entry.scores else {})
        if self._method.keeps_all:
            counts: IntArray = np.full(len(self._layers), plan.prompt_blocks, dtype=np.int64)
            pages = deal_pages(self._arena.geometry, blocks, counts, shuffle=True)
            self._codec.copy(np.concatenate(sources), np.concatenate(pages))
            clock.lap("move")
        else:
            counts, kept = self._choose(plan, entry, sources, clock)
            pages = deal_pages(self._arena.geometry, blocks, counts)
            clock.lap("allocate")
            self._codec.move(sources, kept, pages)
            clock.lap("move")
        self._arena.admit(request_id, plan, blocks, pages)
        clock.lap("allocate")
        for phase, seconds in clock.laps.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if self._config.log_requests:
            self._log(request_id, plan, counts, clock)

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
                entry = Entry(plan.prompt_len, plan, [0] * plan.prompt_blocks, 0, window=window)
                self._choose(plan, entry, self._sources(plan, entry), _Clock({}))
        self._codec.warm_up()

    def score_in_step(self, layer: int, entry: Entry, keys: Tensor) -> None:
        """Score a layer of a prompt that runs in one step, while its keys are at hand.

        Args:
            layer: Index in the arena.
            entry: The request; mutated: its window is read, its scores are kept in it.
            keys: All the prompt's keys after RoPE, [N, S, D].

        """
        if entry.plan is None:
            raise ValueError("only requests with a plan are scored")
        start = time.perf_counter()
        entry.scores[layer] = self._method.score(self._input(layer, entry.plan, entry, keys=keys))
        entry.score_seconds += time.perf_counter() - start

    def _sources(self, plan: ArenaPlan, entry: Entry) -> list[IntArray]:
        blocks = entry.blocks[: plan.prompt_blocks]
        return list(self._arena.geometry.all_pages(blocks))

    def _choose(
        self, plan: ArenaPlan, entry: Entry, sources: Sequence[IntArray], clock: "_Clock"
    ) -> tuple[IntArray, list[Tensor]]:
        """Return pages per layer, int64 [L], and the tokens that each layer keeps, int [N, T_l]."""
        scores = settled(self._score_layers(plan, entry, sources))
        clock.lap("score")
        counts = page_budgets(
            self._method,
            scores,
            pages_per_layer=plan.arena_blocks,
            block_size=plan.block_size,
            prompt_len=plan.prompt_len,
        )
        clock.lap("allocate")
        window = self._method.window
        history = (counts * plan.block_size - window).tolist()
        chosen = self._method.select_layers(scores, history)
        kept = [with_window(ids, plan.prompt_len, window) for ids in chosen]
        clock.lap("select")
        return counts, kept

    def _score_layers(
        self, plan: ArenaPlan, entry: Entry, sources: Sequence[IntArray]
    ) -> list[LayerScores]:
        num_layers = len(self._layers)
        if len(entry.scores) == num_layers:
            return [entry.scores[layer] for layer in range(num_layers)]
        windows = entry.window if self.needs_queries else None
        scores: list[LayerScores] = []
        step = 1
        if windows is not None:
            step = self._codec.layers_at_once(plan.prompt_len, windows.shape[2])
        for first in range(0, num_layers, step):
            group = range(first, min(first + step, num_layers))
            found = None
            if windows is not None and self._method.observes:
                found = self._codec.observe(
                    windows[first : group.stop],
                    sources[first : group.stop],
                    plan.prompt_len,
                    self._layers[first : group.stop],
                )
            for layer in group:
                read_keys = partial(self._codec.read_keys, sources[layer], plan.prompt_len)
                statistics = found[layer - first] if found is not None else None
                given = self._input(layer, plan, entry, read_keys=read_keys, statistics=statistics)
                scores.append(self._method.score(given))
        return scores

    def _input(
        self,
        layer: int,
        plan: ArenaPlan,
        entry: Entry,
        *,
        keys: Tensor | None = None,
        read_keys: Callable[[], Tensor] | None = None,
        statistics: WindowStatistics | None = None,
    ) -> LayerInput:
        facts = self._layers[layer]
        queries = None
        if self.needs_queries and entry.window is not None:
            queries = entry.window[layer].transpose(0, 1)
        return LayerInput(
            layer=layer,
            num_layers=len(self._layers),
            num_tokens=plan.prompt_len,
            num_kv_heads=self._codec.num_kv_heads,
            base=plan.arena_blocks * plan.block_size - self._method.window,
            queries=queries,
            keys=keys,
            scale=facts.scale,
            soft_cap=facts.soft_cap,
            sinks=facts.sinks,
            read_keys=read_keys if Need.KEYS in self._method.needs else None,
            observe=None if statistics is None else lambda: statistics,
        )

    def _log(self, request_id: str, plan: ArenaPlan, counts: IntArray, clock: "_Clock") -> None:
        facts = {
            "request": request_id,
            "method": self._config.method,
            "prompt_tokens": plan.prompt_len,
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

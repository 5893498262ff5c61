"""The prefill hook: score a finished prompt, divide its arena, move the survivors."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_kvcompress.allocation import page_budgets
from vllm_kvcompress.arena import ArenaPlan, IntArray, PageArena, deal_pages
from vllm_kvcompress.config import Planner
from vllm_kvcompress.engine.codec import CpuPageCodec
from vllm_kvcompress.engine.ledger import Entry
from vllm_kvcompress.methods import LayerInput, LayerScores, Need

logger = init_logger("vllm.kvcompress.compressor")


@dataclass(frozen=True)
class LayerFacts:
    """How one layer's attention turns products into logits.

    Attributes:
        scale: Factor of q . k.
        soft_cap: Logit soft cap, 0 for none.
        sinks: Extra logits per query head [H], or None.

    """

    scale: float
    soft_cap: float
    sinks: Tensor | None


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
        codec: CpuPageCodec,
        layers: Sequence[LayerFacts],
    ) -> None:
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
        clock = _Clock()
        if self._method.keeps_all:
            counts: IntArray = np.full(len(self._layers), plan.prompt_blocks, dtype=np.int64)
            pages = deal_pages(self._arena.geometry, blocks, counts, shuffle=True)
            for layer, target in enumerate(pages):
                source = self._arena.geometry.pages(layer, entry.blocks[: plan.prompt_blocks])
                self._codec.copy(torch.from_numpy(source), torch.from_numpy(target))
            clock.lap("move")
        else:
            scores = [self._score(layer, plan, entry) for layer in range(len(self._layers))]
            clock.lap("score")
            counts = page_budgets(
                self._method,
                scores,
                pages_per_layer=plan.arena_blocks,
                block_size=plan.block_size,
                prompt_len=plan.prompt_len,
            )
            pages = deal_pages(self._arena.geometry, blocks, counts)
            clock.lap("allocate")
            for layer, target in enumerate(pages):
                kept = self._keep(scores[layer], plan, len(target))
                clock.lap("select")
                self._move(self._source(layer, plan, entry), kept, target)
                clock.lap("move")
        self._arena.admit(request_id, plan, blocks, pages)
        for phase, seconds in clock.laps.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if self._config.log_requests:
            self._log(request_id, plan, counts, clock)

    def _source(self, layer: int, plan: ArenaPlan, entry: Entry) -> Tensor:
        blocks = entry.blocks[: plan.prompt_blocks]
        return torch.from_numpy(self._arena.geometry.pages(layer, blocks))

    def _score(self, layer: int, plan: ArenaPlan, entry: Entry) -> LayerScores:
        facts = self._layers[layer]
        keys = None
        if Need.KEYS in self._method.needs:
            keys = self._codec.read_keys(self._source(layer, plan, entry), plan.prompt_len)
        queries = None
        if self.needs_queries and entry.window is not None:
            queries = entry.window[layer].transpose(0, 1)
        return self._method.score(
            LayerInput(
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
            )
        )

    def _keep(self, scores: LayerScores, plan: ArenaPlan, num_pages: int) -> Tensor:
        """Return the kept token ids, window last, int64 [N, num_pages * block_size]."""
        window = self._method.window
        history = self._method.select(scores, num_pages * plan.block_size - window)
        recent = torch.arange(plan.prompt_len - window, plan.prompt_len)
        return torch.cat([history, recent.expand(len(history), -1)], dim=1)

    def _move(self, source: Tensor, kept: Tensor, target: IntArray) -> None:
        keys, values = self._codec.gather(source, kept)
        self._codec.write(torch.from_numpy(target), keys, values)

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

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

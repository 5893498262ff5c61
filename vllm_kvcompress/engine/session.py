"""One worker's compression: what each step needs to know, and the hook after a prefill."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.arena import IntArray, PageArena, PageGeometry
from vllm_kvcompress.config import Planner
from vllm_kvcompress.engine.codec import PageCodec
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.facts import LayerFacts
from vllm_kvcompress.engine.ledger import Entry, Ledger
from vllm_kvcompress.tables import BatchRows, LayerTables, StepTableBuilder

logger = init_logger("vllm.kvcompress.session")


@dataclass(frozen=True)
class Capture:
    """Queries of one row that belong to its prompt's observation window.

    Attributes:
        window: Where they go, [L, w, H, D].
        offset: First of the window's w places.
        start: First of the batch's tokens.
        count: How many.
        entry: The request.
        whole: Whether this step holds the whole prompt, so that its keys can be scored at once.

    """

    window: Tensor
    offset: int
    start: int
    count: int
    entry: Entry
    whole: bool

    def take(self, layer: int, query: Tensor) -> None:
        """Copy one layer's queries [T, H, D]. Mutates the window."""
        self.window[layer, self.offset : self.offset + self.count] = query[
            self.start : self.start + self.count
        ].view(self.count, *self.window.shape[2:])


@dataclass(frozen=True)
class StepPlan:
    """What a step has to do beyond plain vLLM.

    Attributes:
        captures: Queries to keep for scoring.
        tables: Per-layer tables; None when no row is compressed and the runner's own serve.

    """

    captures: tuple[Capture, ...]
    tables: LayerTables | None


class Session:
    """State of compression in one worker.

    Args:
        planner: Shared with the scheduler.
        geometry: Where pages lie in the flat view.
        flat_cache: Flat view of the pool, [pages, N, block_size, 2 * D].
        codec: Reads and writes tokens in it.
        layers: Scale, soft cap and sinks per layer, in the order of geometry.origin.
        num_heads: Query heads.
        dtype: The model's dtype.
        make_tables: Returns the backend's builder of per-layer tables for an arena.

    Attributes:
        replays: Whether the coming step runs as a FULL CUDA graph, which reads the per-layer
            tables whatever the batch holds; set by the worker.

    """

    def __init__(
        self,
        planner: Planner,
        geometry: PageGeometry,
        flat_cache: Tensor,
        codec: PageCodec,
        layers: Sequence[LayerFacts],
        num_heads: int,
        dtype: torch.dtype,
        make_tables: Callable[[PageArena], StepTableBuilder],
    ) -> None:
        self.flat_cache = flat_cache
        self.arena = PageArena(geometry)
        self.step: StepPlan | None = None
        self.replays = False
        self.stats = {"compressed": 0, "compressed_steps": 0, "plain_steps": 0}
        self._planner = planner
        self._ledger = Ledger(planner)
        self._tables = make_tables(self.arena)
        self._codec = codec
        self._compressor = Compressor(planner, self.arena, codec, layers)
        self._window_shape = (geometry.num_layers, planner.window, num_heads, codec.head_size)
        self._dtype = dtype
        self._scheduled: frozenset[str] = frozenset()
        self._ending: list[str] = []

    def begin_step(self, output: SchedulerOutput) -> None:
        """Take in the scheduler's message before the model runs. Mutates ledger and arena."""
        void, grown = self._ledger.update(output)
        for request_id in void:
            self.arena.drop(request_id)
        for request_id in grown:
            blocks = self._ledger[request_id].private_blocks()
            if request_id in self.arena and self.arena.can_grow(request_id, blocks):
                self.arena.grow(request_id, blocks)
        self._scheduled = frozenset(output.num_scheduled_tokens)
        self._ending = []
        self.step = None

    def collects(self) -> bool:
        """Whether the step just begun takes queries, for which attention must run in Python."""
        return self._compressor.needs_queries and any(
            self._window_part(self._ledger[request_id]) for request_id in self._scheduled
        )

    def plan_step(
        self,
        request_ids: Sequence[str],
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        slot_mapping: Tensor,
        *,
        query_start_cpu: Tensor,
        seq_lens_bound: Tensor | None,
    ) -> StepPlan | None:
        """Decide what this step's attention has to do. Mutates windows and the session's step.

        Args:
            request_ids: The batch's requests in the order of its rows.
            block_table: int32 [B, W], the runner's block table.
            seq_lens: int32 [B], logical lengths after the step.
            query_start: int32 [B + 1].
            slot_mapping: int64 [T].
            query_start_cpu: The same as query_start, on the host.
            seq_lens_bound: int32 [B] on the host, at least seq_lens; None if not known.

        Returns:
            None for a batch in which plain vLLM does everything.

        """
        if not self._scheduled or not self._scheduled.issuperset(request_ids):
            return None  # a dummy run
        captures: list[Capture] = []
        rows: list[int] = []
        starts = query_start_cpu.tolist()
        for row, request_id in enumerate(request_ids):
            entry = self._ledger[request_id]
            if entry.plan is None:
                continue
            if entry.computed >= entry.prompt_len:
                rows.append(row)
                continue
            end = entry.computed + entry.scheduled
            if end == entry.prompt_len:
                self._ending.append(request_id)
            if capture := self._capture(request_id, starts[row]):
                captures.append(capture)
        self.stats["compressed_steps" if rows else "plain_steps"] += 1
        tables = None
        if rows or self.replays:
            index: IntArray = np.asarray(rows, dtype=np.int64)
            batch = BatchRows(
                block_table=block_table,
                seq_lens=seq_lens,
                query_start=query_start,
                slot_mapping=slot_mapping,
                rows=index,
                slots=self.arena.slots(request_ids[row] for row in rows),
                seq_lens_bound=None if seq_lens_bound is None else seq_lens_bound.numpy(),
            )
            tables = self._tables.build(batch)
        self.step = StepPlan(tuple(captures), tables) if captures or tables else None
        return self.step

    def plan_capture(self, seq_lens: Tensor, num_tokens: int) -> StepPlan:
        """Return what a CUDA graph is captured with. Mutates the table buffers.

        Args:
            seq_lens: int32 [B], the lengths the runner captures with.
            num_tokens: Tokens of the batch.

        """
        return StepPlan((), self._tables.capture(seq_lens, num_tokens))

    def warm_up(self, max_model_len: int) -> None:
        """Run every kernel once, so that no request waits for a compiler. Mutates table buffers.

        Args:
            max_model_len: Tokens of the longest prompt.

        """
        self._compressor.warm_up(self._window_shape, self._dtype, max_model_len)
        self._tables.warm_up()

    def score(self, layer: int, capture: Capture, keys: Tensor) -> None:
        """Score a layer in the step that holds the whole prompt. Mutates the request's entry.

        Args:
            layer: Index in the arena.
            capture: The request's, its queries of this layer taken.
            keys: Keys of the batch after RoPE, [T, N, D] (or with heads and dims merged).

        """
        entry = capture.entry
        first = capture.start + capture.count - entry.prompt_len
        own = keys[first : first + entry.prompt_len]
        own = own.view(entry.prompt_len, self._codec.num_kv_heads, self._codec.head_size)
        self._compressor.score_in_step(layer, entry, own.transpose(0, 1))

    def end_step(self) -> None:
        """Compress the requests whose prefill ended in this step. Mutates arena and pages."""
        for request_id in self._ending:
            entry = self._ledger[request_id]
            self._compressor.compress(request_id, entry)
            entry.forget_window()
            self.stats["compressed"] += 1
        self._ending = []
        self._scheduled = frozenset()
        self.step = None
        if self._planner.config.check_integrity:
            self.check_integrity()

    def check_integrity(self) -> None:
        """Verify the arena against the scheduler's blocks; IntegrityError if they disagree."""
        held = {r: e.private_blocks() for r, e in self._ledger if r in self.arena}
        self.arena.check_integrity(held)

    def _window_part(self, entry: Entry) -> range:
        """Positions of this step's tokens that lie in the prompt's window."""
        if entry.plan is None:
            return range(0)
        first = max(entry.prompt_len - self._planner.window, entry.computed)
        return range(first, min(entry.computed + entry.scheduled, entry.prompt_len))

    def _capture(self, request_id: str, start: int) -> Capture | None:
        entry = self._ledger[request_id]
        part = self._window_part(entry)
        if not self._compressor.needs_queries or not part:
            return None
        if entry.window is None:
            entry.window = torch.empty(
                self._window_shape, dtype=self._dtype, device=self._codec.device
            )
        return Capture(
            window=entry.window,
            offset=part.start - (entry.prompt_len - self._planner.window),
            start=start + part.start - entry.computed,
            count=len(part),
            entry=entry,
            whole=entry.computed == 0 and part.stop == entry.prompt_len,
        )

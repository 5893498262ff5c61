"""One worker's compression: what each step needs to know, and the hook after a prefill."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.step.block_ledger import Ledger
from vllm_kvcompress.engine.step.measurement_channel import attach
from vllm_kvcompress.engine.step.messages import orders_of
from vllm_kvcompress.eviction.compressor import CascadeRun, Compressor
from vllm_kvcompress.eviction.decode_query_buffer import QueryRing
from vllm_kvcompress.eviction.measurements import Report
from vllm_kvcompress.eviction.records import CutRecord
from vllm_kvcompress.eviction.request import Entry
from vllm_kvcompress.paging.arena import IntArray, PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import LayerFacts
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_tables import BatchRows, LayerTables, StepTableBuilder, TableLimits
from vllm_kvcompress.planning.request_settings import Plans

logger = init_logger("vllm.kvcompress.session")


@dataclass(frozen=True)
class Capture:
    """Queries of one row that belong to the observation window of its prompt's next cut.

    Attributes:
        window: Where they go, [L, w, H, D].
        offset: First of the window's w places.
        start: First of the batch's tokens.
        count: How many.
        entry: The request.
        whole: Whether this step holds all tokens up to the prompt's end, none of them computed
            before, so that its keys can be scored at once.

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
class Cascading:
    """One row whose layers are cut as soon as they have run.

    Attributes:
        run: Its division so far.
        entry: The request.
        start: First of its tokens in the batch.

    """

    run: CascadeRun
    entry: Entry
    start: int


@dataclass(frozen=True)
class StepPlan:
    """What a step has to do beyond plain vLLM.

    Attributes:
        captures: Queries of prompts to keep for scoring.
        tables: Per-layer tables; None when no row is compressed and the runner's own serve.
        cascades: Rows to be cut layer by layer.
        ring: Whether queries of generated tokens are to be kept.

    """

    captures: tuple[Capture, ...]
    tables: LayerTables | None
    cascades: tuple[Cascading, ...] = ()
    ring: QueryRing | None = None


class Session:
    """State of compression in one worker.

    Args:
        plans: Shared with the scheduler.
        geometry: Where pages lie in the flat view.
        flat_cache: Flat view of the pool, [pages, N, block_size, 2 * D].
        codec: Reads and writes tokens in it.
        layers: Scale, soft cap and sinks per layer, in the order of geometry.origin.
        num_heads: Query heads.
        dtype: The model's dtype.
        make_tables: Returns the backend's builder of per-layer tables for an arena.
        limits: The largest batch there can be.
        group: The KV-cache group that is compressed.

    Attributes:
        replays: Whether the coming step runs as a FULL CUDA graph, which reads the per-layer
            tables whatever the batch holds; set by the worker.

    """

    def __init__(
        self,
        plans: Plans,
        geometry: PageGeometry,
        flat_cache: Tensor,
        codec: PageCodec,
        layers: Sequence[LayerFacts],
        num_heads: int,
        dtype: torch.dtype,
        make_tables: Callable[[PageArena], StepTableBuilder],
        limits: TableLimits,
        group: int = 0,
    ) -> None:
        self.flat_cache = flat_cache
        self.arena = PageArena(geometry)
        self.step: StepPlan | None = None
        self.replays = False
        self.stats = dict.fromkeys(
            ("prompt_cuts", "chunk_cuts", "decode_cuts", "compressed_steps", "plain_steps"), 0
        )
        self.books: dict[str, int] = {}
        self._plans = plans
        self._ledger = Ledger(plans, group)
        self._tables = make_tables(self.arena)
        self._codec = codec
        self._compressor = Compressor(plans.own.config, self.arena, codec, layers)
        self._query_shape = (num_heads, codec.head_size)
        self._dtype = dtype
        self._ring: QueryRing | None = None
        if plans.own.config.decode_budget is not None:
            self._ring = QueryRing(
                geometry.num_layers,
                plans.decode_queries,
                num_heads,
                codec.head_size,
                rows=limits.rows,
                tokens=limits.tokens,
                dtype=dtype,
                device=codec.device,
                in_place=self._tables.in_place,
            )
        self._scheduled: frozenset[str] = frozenset()
        self._ending: list[str] = []
        self._cascades: dict[str, CascadeRun] = {}

    def begin_step(self, output: SchedulerOutput) -> None:
        """Take in the scheduler's message before the model runs. Mutates ledger and arena."""
        orders = orders_of(output)
        void, grown = self._ledger.update(output)
        for request_id in void:
            self.arena.drop(request_id)
            if self._ring is not None:
                self._ring.drop(request_id)
        for request_id in grown:
            blocks = self._ledger[request_id].private_blocks()
            if request_id in self.arena and self.arena.can_grow(request_id, blocks):
                self.arena.grow(request_id, blocks)
        self._cascades = {}
        for request_id in orders.fronts:
            run = self._compressor.begin_cascade(self._ledger[request_id])
            self.arena.stage(request_id, run.layers.sources)
            self._cascades[request_id] = run
        if orders.books:
            self.books = dict(orders.books)
        self._scheduled = frozenset(output.num_scheduled_tokens)
        self._ending = []
        self.step = None

    @property
    def records(self) -> list[CutRecord] | None:
        """Descriptions of compressions, appended to; None: none are made."""
        return self._compressor.records

    @records.setter
    def records(self, records: list[CutRecord] | None) -> None:
        self._compressor.records = records

    def report_with(self, output: Any) -> Any:
        """Send what was measured along with a step's output. Mutates both; returns the output."""
        if self._compressor.report and attach(output, self._compressor.report):
            self._compressor.report = Report()
        return output

    def collects(self) -> bool:
        """Whether the step just begun looks into a prompt's attention, which must run in Python."""
        if self._cascades:
            return True
        entries = [self._ledger[request_id] for request_id in self._scheduled]
        return any(e.terms.planner.needs_queries and self._prompt_part(e) for e in entries)

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
        cascades: list[Cascading] = []
        generated: list[tuple[str, int, range]] = []
        rows: list[int] = []
        starts = query_start_cpu.tolist()
        for row, request_id in enumerate(request_ids):
            entry = self._ledger[request_id]
            if entry.course is None:
                continue
            if request_id in self.arena:
                rows.append(row)
            if request_id in self._cascades:
                cascades.append(Cascading(self._cascades[request_id], entry, starts[row]))
            if entry.next_cut == entry.computed + entry.scheduled:
                self._ending.append(request_id)
            if capture := self._capture(entry, starts[row]):
                captures.append(capture)
            elif part := self._generated_part(entry):
                first = starts[row] + part.start - entry.computed
                generated.append(
                    (request_id, first, _places(entry, part, entry.terms.planner.decode_queries))
                )
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
        ring = self._ring if self._ring is not None and self._ring.plan(generated) else None
        if captures or tables or ring:
            self.step = StepPlan(tuple(captures), tables, tuple(cascades), ring)
        return self.step

    def plan_capture(self, seq_lens: Tensor, num_tokens: int) -> StepPlan:
        """Return what a CUDA graph is captured with. Mutates the table buffers.

        Args:
            seq_lens: int32 [B], the lengths the runner captures with.
            num_tokens: Tokens of the batch.

        """
        return StepPlan((), self._tables.capture(seq_lens, num_tokens), ring=self._ring)

    def warm_up(self, max_model_len: int) -> None:
        """Run every kernel once, so that no request waits for a compiler. Mutates table buffers.

        Args:
            max_model_len: Tokens of the longest prompt.

        """
        self._compressor.warm_up(self._plans, self._query_shape, self._dtype, max_model_len)
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
        self._compressor.score_in_step(layer, entry, self._own_keys(keys, first, entry))

    def cascade(self, layer: int, row: Cascading, keys: Tensor | None) -> None:
        """Cut a layer of a row whose attention has just run. Mutates its run and arena pages.

        Args:
            layer: Index in the arena.
            row: The request's; its queries of this layer are taken.
            keys: As for :meth:`score`; None where reading the pages is as good.

        """
        own = None
        if keys is not None and row.entry.computed == 0:
            own = self._own_keys(keys, row.start, row.entry)
        self._compressor.cascade(row.run, layer, row.entry, own)

    def _own_keys(self, keys: Tensor, first: int, entry: Entry) -> Tensor:
        """Keys of one row that holds a whole prompt, [N, S, D]."""
        own = keys[first : first + entry.prompt_len]
        shape = (entry.prompt_len, self._codec.num_kv_heads, self._codec.head_size)
        return own.view(shape).transpose(0, 1)

    def end_step(self) -> None:
        """Make the cuts that are due after this step. Mutates arena, ledger and pages."""
        for request_id in self._ending:
            entry = self._ledger[request_id]
            if run := self._cascades.get(request_id):
                self._compressor.finish_cascade(request_id, entry, run)
            else:
                windows, planner = entry.window, entry.terms.planner
                if windows is None and self._ring is not None and planner.needs_queries:
                    windows = self._ring.windows(request_id, planner.decode_queries)
                self._compressor.cut(request_id, entry, windows)
            self._count(entry)
        self._ending = []
        self._cascades = {}
        self._scheduled = frozenset()
        self.step = None
        if self._plans.own.config.check_integrity:
            self.check_integrity()

    def _count(self, entry: Entry) -> None:
        assert entry.course is not None
        self.stats[f"{entry.course.kind(entry.cuts)}_cuts"] += 1

    def check_integrity(self) -> None:
        """Verify the arena against the scheduler's blocks; IntegrityError if they disagree."""
        held = {r: e.private_blocks() for r, e in self._ledger if r in self.arena}
        self.arena.check_integrity(held)

    def _prompt_part(self, entry: Entry) -> range:
        """Positions of this step's tokens in the window of the next cut, one of the prompt's."""
        inside = entry.course is not None and entry.cuts < len(entry.course.cuts)
        return self._part(entry, entry.terms.planner.window) if inside else range(0)

    def _generated_part(self, entry: Entry) -> range:
        """The same for a cut of the generation, whose queries the ring takes."""
        inside = entry.course is not None and entry.cuts < len(entry.course.cuts)
        planner = entry.terms.planner
        if inside or self._ring is None or not planner.needs_queries:
            return range(0)
        return self._part(entry, planner.decode_queries)

    def _part(self, entry: Entry, window: int) -> range:
        """Positions of this step's tokens among the last ones before the next cut."""
        cut = entry.next_cut
        if cut is None:
            return range(0)
        first = max(cut - window, entry.computed)
        return range(first, min(entry.computed + entry.scheduled, cut))

    def _capture(self, entry: Entry, start: int) -> Capture | None:
        part = self._prompt_part(entry)
        planner = entry.terms.planner
        if not planner.needs_queries or not part:
            return None
        if entry.window is None:
            shape = (self.arena.geometry.num_layers, planner.window, *self._query_shape)
            entry.window = torch.empty(shape, dtype=self._dtype, device=self._codec.device)
        return Capture(
            window=entry.window,
            offset=_places(entry, part, planner.window).start,
            start=start + part.start - entry.computed,
            count=len(part),
            entry=entry,
            whole=entry.computed == 0 and part.stop == entry.prompt_len and entry.front is None,
        )


def _places(entry: Entry, part: range, window: int) -> range:
    """Places of positions in the window of the next cut."""
    assert entry.next_cut is not None
    first = entry.next_cut - window
    return range(part.start - first, part.stop - first)

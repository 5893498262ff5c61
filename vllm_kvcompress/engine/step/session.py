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
from vllm_kvcompress.engine.step.messages import message_of
from vllm_kvcompress.eviction.compressor import Compressor, RunningCascade
from vllm_kvcompress.eviction.decode_query_buffer import DecodeQueryBuffer
from vllm_kvcompress.eviction.measurements import Report
from vllm_kvcompress.eviction.records import CutRecord
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.paging.arena import IntArray, PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_tables import BatchRows, LayerTables, StepTableBuilder, TableLimits
from vllm_kvcompress.planning.request_settings import SettingsResolver

logger = init_logger("vllm.kvcompress.session")


@dataclass(frozen=True)
class WindowCapture:
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
    request: WorkerRequest
    whole: bool

    def take(self, layer: int, query: Tensor) -> None:
        """Copy one layer's queries [T, H, D]. Mutates the window."""
        self.window[layer, self.offset : self.offset + self.count] = query[
            self.start : self.start + self.count
        ].view(self.count, *self.window.shape[2:])


@dataclass(frozen=True)
class CascadeRow:
    """One row whose layers are cut as soon as they have run.

    Attributes:
        run: Its division so far.
        entry: The request.
        start: First of its tokens in the batch.

    """

    run: RunningCascade
    request: WorkerRequest
    start: int


@dataclass(frozen=True)
class StepInputs:
    """What a step has to do beyond plain vLLM.

    Attributes:
        captures: Queries of prompts to keep for scoring.
        tables: Per-layer tables; None when no row is compressed and the runner's own serve.
        cascades: Rows to be cut layer by layer.
        ring: Whether queries of generated tokens are to be kept.

    """

    captures: tuple[WindowCapture, ...]
    tables: LayerTables | None
    cascades: tuple[CascadeRow, ...] = ()
    query_buffer: DecodeQueryBuffer | None = None


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
        resolver: SettingsResolver,
        geometry: PageGeometry,
        flat_cache: Tensor,
        codec: PageCodec,
        layers: Sequence[AttentionParams],
        num_heads: int,
        dtype: torch.dtype,
        make_tables: Callable[[PageArena], StepTableBuilder],
        limits: TableLimits,
        group: int = 0,
    ) -> None:
        self.flat_cache = flat_cache
        self.arena = PageArena(geometry)
        self.step: StepInputs | None = None
        self.replays = False
        self.stats = dict.fromkeys(
            ("prompt_cuts", "chunk_cuts", "decode_cuts", "compressed_steps", "plain_steps"), 0
        )
        self.books: dict[str, int] = {}
        self._resolver = resolver
        self._ledger = Ledger(resolver, group)
        self._tables = make_tables(self.arena)
        self._codec = codec
        self._compressor = Compressor(resolver.default_planner.config, self.arena, codec, layers)
        self._query_shape = (num_heads, codec.head_size)
        self._dtype = dtype
        self._query_buffer: DecodeQueryBuffer | None = None
        if resolver.default_planner.config.decode_budget is not None:
            self._query_buffer = DecodeQueryBuffer(
                geometry.num_layers,
                resolver.largest_decode_window,
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
        self._cascades: dict[str, RunningCascade] = {}

    def begin_step(self, output: SchedulerOutput) -> None:
        """Take in the scheduler's message before the model runs. Mutates ledger and arena."""
        message = message_of(output)
        void, grown = self._ledger.update(output)
        for request_id in void:
            self.arena.drop(request_id)
            if self._query_buffer is not None:
                self._query_buffer.drop(request_id)
        for request_id in grown:
            blocks = self._ledger[request_id].private_blocks()
            if request_id in self.arena and self.arena.can_grow(request_id, blocks):
                self.arena.grow(request_id, blocks)
        self._cascades = {}
        for request_id in message.prefill_blocks:
            run = self._compressor.begin_cascade(self._ledger[request_id])
            self.arena.stage(request_id, run.layers.sources)
            self._cascades[request_id] = run
        if message.books:
            self.books = dict(message.books)
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
        return any(e.settings.planner.needs_queries and self._prompt_part(e) for e in entries)

    def prepare_step(
        self,
        request_ids: Sequence[str],
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        slot_mapping: Tensor,
        *,
        query_start_cpu: Tensor,
        seq_lens_bound: Tensor | None,
    ) -> StepInputs | None:
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
        captures: list[WindowCapture] = []
        cascades: list[CascadeRow] = []
        generated: list[tuple[str, int, range]] = []
        rows: list[int] = []
        starts = query_start_cpu.tolist()
        for row, request_id in enumerate(request_ids):
            request = self._ledger[request_id]
            if request.schedule is None:
                continue
            if request_id in self.arena:
                rows.append(row)
            if request_id in self._cascades:
                cascades.append(CascadeRow(self._cascades[request_id], request, starts[row]))
            if request.next_cut == request.computed + request.scheduled:
                self._ending.append(request_id)
            if capture := self._capture(request, starts[row]):
                captures.append(capture)
            elif part := self._generated_part(request):
                first = starts[row] + part.start - request.computed
                generated.append(
                    (
                        request_id,
                        first,
                        _places(request, part, request.settings.planner.decode_window),
                    )
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
        query_buffer = (
            self._query_buffer
            if self._query_buffer is not None and self._query_buffer.plan(generated)
            else None
        )
        if captures or tables or query_buffer:
            self.step = StepInputs(tuple(captures), tables, tuple(cascades), query_buffer)
        return self.step

    def capture_inputs(self, seq_lens: Tensor, num_tokens: int) -> StepInputs:
        """Return what a CUDA graph is captured with. Mutates the table buffers.

        Args:
            seq_lens: int32 [B], the lengths the runner captures with.
            num_tokens: Tokens of the batch.

        """
        return StepInputs(
            (), self._tables.capture(seq_lens, num_tokens), query_buffer=self._query_buffer
        )

    def warm_up(self, max_model_len: int) -> None:
        """Run every kernel once, so that no request waits for a compiler. Mutates table buffers.

        Args:
            max_model_len: Tokens of the longest prompt.

        """
        self._compressor.warm_up(self._resolver, self._query_shape, self._dtype, max_model_len)
        self._tables.warm_up()

    def score(self, layer: int, capture: WindowCapture, keys: Tensor) -> None:
        """Score a layer in the step that holds the whole prompt. Mutates the request's entry.

        Args:
            layer: Index in the arena.
            capture: The request's, its queries of this layer taken.
            keys: Keys of the batch after RoPE, [T, N, D] (or with heads and dims merged).

        """
        request = capture.request
        first = capture.start + capture.count - request.prompt_len
        self._compressor.score_in_step(layer, request, self._own_keys(keys, first, request))

    def cascade(self, layer: int, row: CascadeRow, keys: Tensor | None) -> None:
        """Cut a layer of a row whose attention has just run. Mutates its run and arena pages.

        Args:
            layer: Index in the arena.
            row: The request's; its queries of this layer are taken.
            keys: As for :meth:`score`; None where reading the pages is as good.

        """
        own = None
        if keys is not None and row.request.computed == 0:
            own = self._own_keys(keys, row.start, row.request)
        self._compressor.cascade(row.run, layer, row.request, own)

    def _own_keys(self, keys: Tensor, first: int, request: WorkerRequest) -> Tensor:
        """Keys of one row that holds a whole prompt, [N, S, D]."""
        own = keys[first : first + request.prompt_len]
        shape = (request.prompt_len, self._codec.num_kv_heads, self._codec.head_size)
        return own.view(shape).transpose(0, 1)

    def end_step(self) -> None:
        """Make the cuts that are due after this step. Mutates arena, ledger and pages."""
        for request_id in self._ending:
            request = self._ledger[request_id]
            if run := self._cascades.get(request_id):
                self._compressor.finish_cascade(request_id, request, run)
            else:
                windows, planner = request.window, request.settings.planner
                if windows is None and self._query_buffer is not None and planner.needs_queries:
                    windows = self._query_buffer.windows(request_id, planner.decode_window)
                self._compressor.cut(request_id, request, windows)
            self._count(request)
        self._ending = []
        self._cascades = {}
        self._scheduled = frozenset()
        self.step = None
        if self._resolver.default_planner.config.check_integrity:
            self.check_integrity()

    def _count(self, request: WorkerRequest) -> None:
        assert request.schedule is not None
        self.stats[f"{request.schedule.kind(request.cuts_made)}_cuts"] += 1

    def check_integrity(self) -> None:
        """Verify the arena against the scheduler's blocks; IntegrityError if they disagree."""
        held = {r: e.private_blocks() for r, e in self._ledger if r in self.arena}
        self.arena.check_integrity(held)

    def _prompt_part(self, request: WorkerRequest) -> range:
        """Positions of this step's tokens in the window of the next cut, one of the prompt's."""
        inside = request.schedule is not None and request.cuts_made < len(
            request.schedule.prefill_cuts
        )
        return self._part(request, request.settings.planner.window) if inside else range(0)

    def _generated_part(self, request: WorkerRequest) -> range:
        """The same for a cut of the generation, whose queries the ring takes."""
        inside = request.schedule is not None and request.cuts_made < len(
            request.schedule.prefill_cuts
        )
        planner = request.settings.planner
        if inside or self._query_buffer is None or not planner.needs_queries:
            return range(0)
        return self._part(request, planner.decode_window)

    def _part(self, request: WorkerRequest, window: int) -> range:
        """Positions of this step's tokens among the last ones before the next cut."""
        cut = request.next_cut
        if cut is None:
            return range(0)
        first = max(cut - window, request.computed)
        return range(first, min(request.computed + request.scheduled, cut))

    def _capture(self, request: WorkerRequest, start: int) -> WindowCapture | None:
        part = self._prompt_part(request)
        planner = request.settings.planner
        if not planner.needs_queries or not part:
            return None
        if request.window is None:
            shape = (self.arena.geometry.num_layers, planner.window, *self._query_shape)
            request.window = torch.empty(shape, dtype=self._dtype, device=self._codec.device)
        return WindowCapture(
            window=request.window,
            offset=_places(request, part, planner.window).start,
            start=start + part.start - request.computed,
            count=len(part),
            request=request,
            whole=request.computed == 0
            and part.stop == request.prompt_len
            and request.prefill_blocks is None,
        )


def _places(request: WorkerRequest, part: range, window: int) -> range:
    """Places of positions in the window of the next cut."""
    assert request.next_cut is not None
    first = request.next_cut - window
    return range(part.start - first, part.stop - first)

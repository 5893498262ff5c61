"""One worker's compression around each step: what the step needs, and the cuts after it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.step.batch_order import BatchOrder
from vllm_kvcompress.engine.step.block_ledger import BlockLedger
from vllm_kvcompress.engine.step.measurement_channel import attach
from vllm_kvcompress.engine.step.messages import prefill_blocks_of
from vllm_kvcompress.eviction.cascade_prefill import CascadePrefill
from vllm_kvcompress.eviction.compressor import Compressor
from vllm_kvcompress.eviction.cut_reporter import CutReporter
from vllm_kvcompress.eviction.decode_query_buffer import DecodeQueryBuffer
from vllm_kvcompress.eviction.measurements import CutReport
from vllm_kvcompress.eviction.query_collector import QueryCollector, WindowCapture
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.shared_cuts import DueCut
from vllm_kvcompress.paging.arena import PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.page_codec import PageCodec
from vllm_kvcompress.paging.page_tables import BatchRows, LayerTables, StepTableBuilder, TableLimits
from vllm_kvcompress.planning.request_settings import SettingsResolver


@dataclass(frozen=True)
class CascadeRow:
    """One row of a batch whose layers are cut as soon as they have run.

    Attributes:
        prefill: The request's cascade.
        request: The request.
        start: First of its tokens in the batch.

    """

    prefill: CascadePrefill
    request: WorkerRequest
    start: int


@dataclass(frozen=True)
class StepInputs:
    """What a step has to do beyond plain vLLM.

    Attributes:
        captures: Queries of prompts to keep for scoring.
        tables: Per-layer tables; None when no row is compressed and the runner's own serve.
        cascades: Rows to be cut layer by layer.
        query_buffer: Takes queries of generated tokens; None if it needs none of this step's.

    """

    captures: tuple[WindowCapture, ...]
    tables: LayerTables | None
    cascades: tuple[CascadeRow, ...] = ()
    query_buffer: DecodeQueryBuffer | None = None


class Session:
    """State of compression in one worker.

    Each step takes the same way: :meth:`begin_step` with the scheduler's message,
    :meth:`prepare_step` when attention metadata is built, :meth:`score` and :meth:`cut_layer` from
    within attention, :meth:`end_step` after the step's tokens have been sampled.

    Args:
        resolver: Resolves requests' settings as the scheduler does.
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
        arena: Page tables of the compressed requests.
        step: What the step at hand has to do; None if plain vLLM does everything.
        replays: Whether the coming step runs as a FULL CUDA graph, which reads the per-layer
            tables whatever the batch holds; set by the worker.
        stats: Cuts and steps of each kind so far.
        reporter: Seconds spent on cuts, and descriptions of them if somebody asked for those.

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
        config = resolver.default_planner.config
        self.flat_cache = flat_cache
        self.arena = PageArena(geometry)
        self.step: StepInputs | None = None
        self.replays = False
        self.stats = dict.fromkeys(
            ("prompt_cuts", "chunk_cuts", "decode_cuts", "compressed_steps", "plain_steps"), 0
        )
        self._resolver = resolver
        self._ledger = BlockLedger(resolver, group)
        self._tables = make_tables(self.arena)
        self._codec = codec
        self.reporter = CutReporter(config.log_requests, geometry.block_size)
        self._compressor = Compressor(self.arena, codec, layers, self.reporter)
        self._query_shape = (num_heads, codec.head_size)
        self._dtype = dtype
        buffer: DecodeQueryBuffer | None = None
        if config.decode_budget is not None:
            buffer = DecodeQueryBuffer(
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
        self._queries = QueryCollector(
            geometry.num_layers, self._query_shape, dtype, codec.device, buffer
        )
        self._order = BatchOrder(self.arena)
        self._scheduled: Mapping[str, int] = {}
        self._busy: list[str] = []
        self._ending: list[str] = []
        self._cascades: dict[str, CascadePrefill] = {}

    # --- before the model runs -------------------------------------------------------------------

    def begin_step(self, output: SchedulerOutput) -> None:
        """Take in the scheduler's message before the model runs. Mutates ledger and arena.

        Cuts of the last step that are still due are made first.
        """
        cascades = prefill_blocks_of(output)  # refuses a foreign message before anything changes
        if self._ending:
            self.end_step()
        changes = self._ledger.update(output)
        for request_id in changes.void:
            self.arena.drop(request_id)
            self._queries.drop(request_id)
        self.arena.grow(
            {name: blocks for name, blocks in changes.grown.items() if name in self.arena}
        )
        self._cascades = {
            request_id: self._compressor.begin_cascade(request_id, self._ledger[request_id])
            for request_id in cascades
        }
        self._scheduled = output.num_scheduled_tokens
        self._busy = changes.busy
        self._ending = []
        self.step = None

    def collects(self) -> bool:
        """Whether the step just begun looks into a prompt's attention, which must run in Python."""
        if self._cascades:
            return True
        return any(self._queries.needs(self._ledger[name]) for name in self._busy)

    def prepare_step(
        self, request_ids: Sequence[str], common: CommonAttentionMetadata
    ) -> StepInputs | None:
        """Decide what this step's attention has to do. Mutates windows and the session's step.

        Args:
            request_ids: The batch's requests in the order of its rows.
            common: What the runner knows of the batch.

        Returns:
            None for a batch in which plain vLLM does everything.

        """
        if not self._order.follow(request_ids, self._scheduled):
            return None  # a dummy run
        cascades = self._read_rows(common)
        rows = self._order.rows
        self.stats["compressed_steps" if len(rows) else "plain_steps"] += 1
        tables = None
        if len(rows) or self.replays:
            # A graph was captured with the longest length there can be.
            bound = None if self.replays else common.seq_lens_cpu_upper_bound
            batch = BatchRows(
                block_table=common.block_table_tensor,
                seq_lens=common.seq_lens,
                query_start=common.query_start_loc,
                slot_mapping=common.slot_mapping,
                rows=rows,
                slots=self._order.slots,
                seq_lens_bound=None if bound is None else bound.numpy(),
            )
            tables = self._tables.build(batch)
        query_buffer = self._queries.select_generated()
        captures = tuple(self._queries.captures)
        if captures or tables or query_buffer:
            self.step = StepInputs(captures, tables, cascades, query_buffer)
        return self.step

    def _read_rows(self, common: CommonAttentionMetadata) -> tuple[CascadeRow, ...]:
        """Note busy rows' queries and due cuts; returns the rows that run as a cascade."""
        self._queries.begin_step()
        if not self._busy:
            return ()
        cascades = []
        starts: list[int] = common.query_start_loc_cpu.tolist()
        for request_id in self._busy:
            row = self._order.place(request_id)
            if row is None:
                continue
            request = self._ledger[request_id]
            if request.ends_at_cut:
                self._ending.append(request_id)
            if prefill := self._cascades.get(request_id):
                cascades.append(CascadeRow(prefill, request, starts[row]))
            self._queries.add(request_id, request, starts[row])
        return tuple(cascades)

    # --- while the model runs --------------------------------------------------------------------

    def score(self, layer: int, capture: WindowCapture, keys: Tensor) -> None:
        """Score a layer in the step that holds the whole prompt. Mutates the request.

        Args:
            layer: Index in the arena.
            capture: The request's, its queries of this layer taken.
            keys: Keys of the batch after RoPE, [T, N, D] (or with heads and dims merged).

        """
        request = capture.request
        first = capture.start + capture.count - request.prompt_len
        self._compressor.score_in_step(layer, request, self._own_tokens(keys, first, request))

    def cut_layer(
        self, layer: int, row: CascadeRow, keys: Tensor | None, values: Tensor | None
    ) -> None:
        """Cut a layer of a row whose attention has just run. Mutates its cascade and arena pages.

        Args:
            layer: Index in the arena.
            row: The request's; its queries of this layer are taken.
            keys: As for :meth:`score`; None where reading the pages is as good.
            values: As keys.

        """
        own: list[Tensor] = []
        if keys is not None and values is not None and row.request.computed == 0:
            own = [self._own_tokens(part, row.start, row.request) for part in (keys, values)]
        row.prefill.cut_layer(layer, *(own or (None, None)))

    def _own_tokens(self, keys: Tensor, first: int, request: WorkerRequest) -> Tensor:
        """Keys or values of one row that holds a whole prompt, [N, S, D]."""
        own = keys[first : first + request.prompt_len]
        shape = (request.prompt_len, self._codec.num_kv_heads, self._codec.head_size)
        return own.view(shape).transpose(0, 1)

    # --- after sampling --------------------------------------------------------------------------

    def end_step(self) -> None:
        """Make the cuts that are due after this step. Mutates arena, ledger and pages."""
        due = []
        for request_id in self._ending:
            request = self._ledger[request_id]
            if cascade := self._cascades.get(request_id):
                cascade.finish()
            else:
                windows = self._queries.windows(request_id, request)
                due.append(DueCut(request_id, request, windows))
        self._compressor.cut_all(due)
        for request_id in self._ending:
            request = self._ledger[request_id]
            assert request.schedule is not None
            self.stats[f"{request.schedule.kind(request.cuts_made)}_cuts"] += 1
        self._ending = []
        self._cascades = {}
        self._scheduled = {}
        self.step = None
        if self._resolver.default_planner.config.check_integrity:
            self.check_integrity()

    def report_with(self, output: Any) -> Any:
        """Send what was measured along with a step's output. Mutates both; returns the output."""
        if self.reporter.report and attach(output, self.reporter.report):
            self.reporter.report = CutReport()
        return output

    # --- beside the steps ------------------------------------------------------------------------

    def warm_up(self, max_model_len: int) -> None:
        """Run every kernel once, so that no request waits for a compiler. Mutates table buffers.

        Args:
            max_model_len: Tokens of the longest prompt.

        """
        methods = self._resolver.possible_methods()
        self._compressor.warm_up(methods, self._query_shape, self._dtype, max_model_len)
        self._tables.warm_up()

    def capture_inputs(self, seq_lens: Tensor, num_tokens: int) -> StepInputs:
        """Return what a CUDA graph is captured with. Mutates the table buffers.

        A batch of dummies that replays a graph, as data parallelism makes them, comes here too: it
        must take no queries with the index of the last batch.

        Args:
            seq_lens: int32 [B], the lengths the runner captures with.
            num_tokens: Tokens of the batch.

        """
        tables = self._tables.capture(seq_lens, num_tokens)
        return StepInputs((), tables, query_buffer=self._queries.select_none())

    def check_integrity(self) -> None:
        """Verify the arena against the scheduler's blocks.

        Raises:
            IntegrityError: They disagree.

        """
        self.arena.check_integrity(
            {name: r.private_blocks() for name, r in self._ledger if name in self.arena}
        )

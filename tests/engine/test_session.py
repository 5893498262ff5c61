"""What a step asks of the worker's session, without a model."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_kvcompress.engine.step.block_ledger import BlockLedger
from vllm_kvcompress.engine.step.messages import attach
from vllm_kvcompress.engine.step.session import Session
from vllm_kvcompress.eviction.query_collector import QueryCollector
from vllm_kvcompress.paging.arena import PageArena, PageGeometry, deal_pages
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.strided_codec import StridedPageCodec
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver

LAYERS, HEADS, DIM, SIZE, BLOCKS = 3, 2, 8, 4, 400
PROMPT, BUDGET = 40, 16
CPU = torch.device("cpu")


def make(rows: int, **settings: Any) -> Session:
    """A session on the CPU, with the tables of a device."""
    config = KVCompressionConfig.parse(
        {"method": "snapkv", "budget": BUDGET, "window": 4, **settings}
    )
    resolver = SettingsResolver(config, SIZE)
    geometry = PageGeometry(np.arange(LAYERS, dtype=np.int64) * BLOCKS, 1, BLOCKS, SIZE)
    flat = torch.zeros(LAYERS * BLOCKS, SIZE, 1, 2 * DIM).transpose(1, 2)
    limits = TableLimits(rows, width=64, tokens=rows * PROMPT)
    return Session(
        resolver,
        geometry,
        flat,
        StridedPageCodec(flat, "auto", torch.float32),
        [AttentionParams(DIM**-0.5, 0.0, None)] * LAYERS,
        HEADS,
        torch.float32,
        lambda arena: DeviceTableBuilder(arena, limits, CPU, implementation="torch"),
        limits,
    )


class Batch:
    """Requests of one session that were cut after their prompt and decode, a token a step."""

    def __init__(self, session: Session, rows: int) -> None:
        self.session = session
        self.names = [f"r{index}" for index in range(rows)]
        self.blocks = iter(range(1, BLOCKS))
        self.tokens = PROMPT
        message = SchedulerOutput.make_empty()
        message.num_scheduled_tokens = dict.fromkeys(self.names, PROMPT)
        message.total_num_scheduled_tokens = rows * PROMPT
        for name in self.names:
            blocks = [0] * (PROMPT // SIZE) + self.take(BUDGET // SIZE)
            message.scheduled_new_reqs.append(
                NewRequestData(name, [1] * PROMPT, [], SamplingParams(), None, (blocks,), 0, None)
            )
        attach(message, {})
        session.begin_step(message)
        for name in self.names:
            request = session._ledger[name]
            assert request.ends_at_cut
            request.advance()
            own = request.private_blocks()
            pages = deal_pages(session.arena.geometry, own, np.full(LAYERS, len(own)))
            column = request.tail_start
            session.arena.admit(name, own, pages, num_tokens=PROMPT, growth_column=column)
        session.end_step()

    def take(self, count: int) -> list[int]:
        return [next(self.blocks) for _ in range(count)]

    def step(self, names: list[str] | None = None) -> int:
        """One token for each request, and a block where it needs one; returns the blocks given."""
        names = self.names if names is None else names
        grows = (self.tokens - PROMPT) % SIZE == 0
        message = SchedulerOutput.make_empty()
        message.num_scheduled_tokens = dict.fromkeys(names, 1)
        message.total_num_scheduled_tokens = len(names)
        cached = CachedRequestData.make_empty()
        cached.req_ids = list(names)
        cached.num_computed_tokens = [self.tokens] * len(names)
        cached.new_block_ids = [(self.take(1),) if grows else None for _ in names]
        message.scheduled_cached_reqs = cached
        attach(message, {})
        self.tokens += 1
        session, rows = self.session, len(names)
        session.begin_step(message)
        session.collects()
        lengths = torch.full((rows,), self.tokens, dtype=torch.int32)
        common: Any = SimpleNamespace(
            block_table_tensor=torch.zeros(rows, 64, dtype=torch.int32),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
            query_start_loc_cpu=torch.arange(rows + 1, dtype=torch.int32),
            slot_mapping=torch.zeros(rows, dtype=torch.int64),
        )
        step = session.prepare_step(names, common)
        assert step is not None
        assert step.tables is not None
        held = BUDGET + self.tokens - PROMPT
        assert step.tables.seq_lens.unique().tolist() == [held]
        assert step.tables.max_lens == [held] * LAYERS
        session.end_step()
        session.check_integrity()
        return rows if grows else 0


@pytest.mark.parametrize("rows", [2, 24])
def test_a_decode_step_looks_only_at_rows_that_change(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(make(rows), rows)
    batch.step()
    batch.step()
    looks = Counter[str]()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any) -> Any:
            looks[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in (
        (BlockLedger, "__getitem__"),
        (BlockLedger, "_look_at_rows"),
        (QueryCollector, "needs"),
        (QueryCollector, "add"),
        (PageArena, "slots"),
        (PageArena, "slot"),
    ):
        count(owner, name)
    for _ in range(2 * SIZE):
        batch.step()
    assert not looks


def test_rows_that_come_and_go_are_followed() -> None:
    batch = Batch(make(4), 4)
    batch.step()
    batch.step(["r2", "r0"])
    assert batch.session._order.slots.tolist() == batch.session.arena.slots(["r2", "r0"]).tolist()
    batch.step(["r2", "r0"])
    batch.step(["r0", "r1", "r2"])


def test_the_queries_before_a_decode_cut_are_noticed_in_time() -> None:
    batch = Batch(make(2, decode_budget=BUDGET, decode_buffer=8), 2)
    session = batch.session
    places = []
    for _ in range(8):
        batch.step()
        buffer = session._queries.buffer
        assert buffer is not None
        places.append([place % buffer.window for place in buffer._places[:2].tolist()])
    # The last four of eight tokens; in the step of the last one the cut is due.
    assert places[4:7] == [[0, 0], [1, 1], [2, 2]]


def test_a_batch_of_dummies_takes_no_queries() -> None:
    """As data parallelism makes them: the graph that they replay copies by the buffer's index."""
    session = make(2, decode_budget=BUDGET, decode_buffer=8)
    buffer = session._queries.buffer
    assert buffer is not None
    buffer.select([("a", 0, range(2)), ("b", 2, range(2))])
    buffer.take(0, torch.full((4, HEADS, DIM), 7.0))
    step = session.capture_inputs(torch.ones(2, dtype=torch.int32), 4)
    assert step.query_buffer is buffer
    buffer.take(0, torch.full((4, HEADS, DIM), -1.0))
    assert buffer.windows("a")[0, :2].unique().tolist() == [7.0]
    assert buffer.windows("b")[0, :2].unique().tolist() == [7.0]

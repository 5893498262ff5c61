"""What of the GPU worker can be looked at without a GPU."""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.startup_plan import compute_plan_fingerprint

from tests.support.refusals import LLAMA
from vllm_kvcompress.engine.attention import BACKENDS
from vllm_kvcompress.engine.attention.flash_attn import ArenaFlashImpl
from vllm_kvcompress.engine.checks import WORKERS
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.step.block_ledger import BlockLedger
from vllm_kvcompress.engine.step.session import Session
from vllm_kvcompress.engine.worker.arena_worker import _follow_v2
from vllm_kvcompress.engine.worker.gpu_worker import ArenaGPUWorker
from vllm_kvcompress.paging.page_tables import LayerTables

GIB = 1 << 30


@pytest.mark.parametrize("path", [*WORKERS, *WORKERS.values(), *BACKENDS.values()])
def test_every_wrapped_worker_and_backend_is_where_it_is_said_to_be(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def make_worker(folder: Path, **options: Any) -> ArenaGPUWorker:
    """A worker that knows its configuration and nothing else."""
    register()
    (folder / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 4096}))
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        **{
            "block_size": 32,
            "max_model_len": 4096,
            "max_num_seqs": 64,
            "additional_config": {"kv_compression": {"method": "cake", "budget": 1024}},
            **options,
        },
    ).create_engine_config()
    worker = ArenaGPUWorker.__new__(ArenaGPUWorker)
    worker.vllm_config = config
    worker.cache_config, worker.model_config = config.cache_config, config.model_config
    return worker


def test_the_pool_leaves_room_for_tables_and_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 40 * GIB)
    worker = make_worker(tmp_path)
    worker.cache_config.kv_cache_memory_bytes = None  # the CPU platform fills it in
    worker.peak_activation_memory, worker.available_kv_cache_memory_bytes = GIB, 40 * GIB
    tables, transient = worker._workspace()
    assert worker.determine_available_memory() == 40 * GIB - tables - transient
    # vLLM proposes a pool of what these leave.
    assert worker.peak_activation_memory == GIB + tables + transient
    assert worker.available_kv_cache_memory_bytes == 40 * GIB - tables - transient
    # Entries of text and arena and two for rounding a row, and as many pages as one of the layers
    # can be dealt or a prompt that is compressed while it runs has, in every layer; then lengths
    # and slots.
    layers = LLAMA["num_hidden_layers"]
    tokens = worker.vllm_config.scheduler_config.max_num_batched_tokens
    mirrored = max(layers * 1024, min(4096, tokens)) // 32
    width = 4096 // 32 + 2 + 1024 // 32 + mirrored
    least = layers * (4 * 64 * width + 8 * tokens)
    assert least <= tables <= 1.2 * least
    assert transient > 2 * 4 * layers * LLAMA["num_key_value_heads"] * 4096


def test_rows_are_wide_enough_for_all_that_is_ever_appended(tmp_path: Path) -> None:
    plain, _ = make_worker(tmp_path)._workspace()
    given = {
        "method": "cake",
        "budget": 1024,
        "prefill": "streaming",
        "stream_chunk": 1024,
        "decode_budget": 1024,
    }
    worker = make_worker(tmp_path, additional_config={"kv_compression": given})
    wider, _ = worker._workspace()
    # Each of up to 5 cuts between chunks takes 2 * 1024 tokens, the first of the generation 1024.
    entries = 5 * 64 + 33
    layers = LLAMA["num_hidden_layers"]
    row = layers * LLAMA["num_attention_heads"] * LLAMA["head_dim"] * 2
    # And the last 32 queries of every request, and a row for those that nobody needs; a layer may
    # be dealt all 128 pages of a prompt, and not 64.
    assert wider - plain == 4 * layers * 64 * (entries + 64) + (64 * 32 + 1) * row


def test_a_pool_sized_by_hand_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 40 * GIB)
    worker = make_worker(tmp_path, kv_cache_memory_bytes=GIB)
    assert worker.determine_available_memory() == 40 * GIB


@pytest.mark.parametrize("changed", [{"budget": 512}, {"decode_budget": 1024}])
def test_a_pool_that_vllm_remembers_is_for_these_settings(
    tmp_path: Path, changed: dict[str, int]
) -> None:
    """With VLLM_ENABLE_STARTUP_PLAN a start takes the last one's pool if nothing has changed.

    What compression sets aside depends on its settings, so they must be part of what is compared.
    """

    def fingerprint(settings: dict[str, Any]) -> str:
        config = make_worker(tmp_path, additional_config={"kv_compression": settings}).vllm_config
        return compute_plan_fingerprint(config, 0, 1)

    settings = {"method": "cake", "budget": 1024}
    assert fingerprint(settings) == fingerprint(dict(settings))
    assert fingerprint(settings) != fingerprint({**settings, **changed})


def test_steps_that_nobody_planned_are_for_vllms_warm_up_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Afterwards, or if that fails, a step of another scheduler's is refused as before."""
    worker = ArenaGPUWorker.__new__(ArenaGPUWorker)
    worker.model_config = SimpleNamespace(max_model_len=100)
    worker._session = Session.__new__(Session)
    worker._session._ledger = BlockLedger(None)  # type: ignore[arg-type]
    worker._session._ending = []
    monkeypatch.setattr(Session, "warm_up", lambda self, max_model_len: None)
    foreign = SchedulerOutput.make_empty()
    foreign.total_num_scheduled_tokens = 1
    ran = []
    monkeypatch.setattr(Worker, "execute_model", lambda self, output: ran.append(output))

    def fail(self: Worker) -> None:
        self.execute_model(foreign)
        raise MemoryError

    for warm_up in (lambda self: self.execute_model(foreign), fail):
        monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up)
        with pytest.raises(MemoryError) if warm_up is fail else nullcontext():
            worker.compile_or_warm_up_model()
        with pytest.raises(RuntimeError, match="not planned by the scheduler of vllm_kvcompress"):
            worker.execute_model(foreign)
    assert ran == [foreign, foreign]


def test_a_schedule_for_other_lengths_never_reaches_a_layer() -> None:
    impl = ArenaFlashImpl.__new__(ArenaFlashImpl)
    impl.arena_layer = 1
    base = FlashAttentionMetadata(
        num_actual_tokens=3,
        max_query_len=1,
        query_start_loc=torch.arange(4, dtype=torch.int32),
        max_seq_len=900,
        seq_lens=torch.tensor([900, 800, 10], dtype=torch.int32),
        block_table=torch.zeros(3, 60, dtype=torch.int32),
        slot_mapping=torch.arange(3),
        scheduler_metadata=torch.zeros(5, dtype=torch.int32),
        max_num_splits=32,
    )
    tables = LayerTables(
        block_tables=torch.arange(2 * 3 * 60, dtype=torch.int32).view(2, 3, 60),
        seq_lens=torch.tensor([[90, 80, 10], [70, 60, 10]], dtype=torch.int32),
        slot_mapping=torch.arange(6).view(2, 3),
        max_lens=[90, 70],
    )
    own = impl.layer_metadata(base, tables)
    assert own.scheduler_metadata is None
    assert own.max_num_splits == 32
    assert own.max_seq_len == 70
    assert own.seq_lens.data_ptr() == tables.seq_lens[1].data_ptr()
    assert own.block_table.data_ptr() == tables.block_tables[1].data_ptr()
    assert own.slot_mapping.data_ptr() == tables.slot_mapping[1].data_ptr()
    assert base.scheduler_metadata is not None
    assert base.max_seq_len == 900


@pytest.mark.parametrize(("collects", "expected"), [(True, None), (False, 1)])
def test_a_step_that_takes_queries_has_no_uniform_length(
    collects: bool, expected: int | None
) -> None:
    runner = SimpleNamespace(
        model_state=SimpleNamespace(prepare_attn=lambda *_, **__: None),
        gather_batch_req_state=lambda output, dummy: ("state", 1),
    )
    session = SimpleNamespace(collects=lambda: collects, replays=False)
    worker: Any = SimpleNamespace(model_runner=runner, _session=session)
    _follow_v2(worker)
    assert runner.gather_batch_req_state(None, False) == ("state", expected)

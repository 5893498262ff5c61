"""The figures' path: worker, scheduler, vLLM's own encoder and decoder, /metrics."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import LoggingStatLogger, StatLoggerManager
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.support.scheduling import Engine, configure
from vllm_kvcompress.engine.compression_stats import (
    BlockGauges,
    CompressionCounters,
    CompressionStats,
    LayerShares,
    attach_stats,
    stats_of,
)
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaScheduler
from vllm_kvcompress.engine.step.measurement_channel import attach, report_of
from vllm_kvcompress.eviction.measurements import CutReport

REPORT = CutReport(
    [("score", 0.25), ("move", 0.5)], {"cake": 800}, {"cake": 200}, [300, 100], {"cake": 2}
)
STATS = CompressionStats(
    BlockGauges(held=3, reserved=5, free=7, running_held=2, running_plain=8),
    CompressionCounters(
        blocks_freed=11,
        prefills={"full": 1, "cascade": 2, "streaming": 0},
        cuts={"prompt": 3, "chunk": 0, "decode": 4},
        compressed_requests={"cake": 3},
        other_requests={"none": 1, "a method: named": 2},
    ),
    REPORT,
    [300 / 800, 100 / 800],
)


def over_zmq(stats: SchedulerStats) -> SchedulerStats:
    """What the server's process gets of a scheduler's figures."""
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(encoded).scheduler_stats
    assert isinstance(decoded, SchedulerStats)
    return decoded


def test_figures_survive_vllms_encoding() -> None:
    sent = SchedulerStats(num_running_reqs=4)
    attach_stats(sent, STATS)
    got = over_zmq(sent)
    assert got.num_running_reqs == 4
    for stats in (sent, got):  # without a process of its own, nothing is encoded
        assert stats.kv_connector_stats is not None
        assert stats_of(stats.kv_connector_stats) == STATS


def test_figures_of_another_type_are_not_taken() -> None:
    sent = SchedulerStats()
    attach_stats(sent, STATS)
    payload = over_zmq(sent).kv_connector_stats
    assert payload is not None
    (slot,) = payload
    payload[slot]["report"]["layer_tokens_kept"] = ["many"]
    with pytest.raises(ValueError, match="Expected `int`, got `str`"):
        stats_of(payload)


def test_a_report_goes_with_the_output_of_a_step() -> None:
    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(["a"], {"a": 0})

    output = ModelRunnerOutput(["a"], {"a": 0})
    assert report_of(output) is None
    assert attach(output, REPORT)
    assert report_of(pickle.loads(pickle.dumps(output))) == REPORT
    later = Later()
    assert attach(later, REPORT)
    assert report_of(later.get_output()) == REPORT
    assert not attach(None, REPORT)
    assert not attach(EMPTY_MODEL_RUNNER_OUTPUT, REPORT)
    assert report_of(EMPTY_MODEL_RUNNER_OUTPUT) is None


def test_prompts_add_up() -> None:
    total = CutReport()
    assert not total
    total.add_prompt("cake", 800, [300, 100])
    total.add_prompt("cake", 200, [60, 41])
    total.add_prompt("uniform", 10, [5, 5])
    seen, kept = {"cake": 1000, "uniform": 10}, {"cake": 250, "uniform": 5}
    assert total == CutReport([], seen, kept, [365, 146])
    assert total
    assert CutReport([("move", 0.5)])


def test_a_scheduler_sends_each_figure_once(folder: Path) -> None:
    engine = Engine(ArenaScheduler, configure(folder), 60)
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    scheduler.log_stats = manager.log_stats = True
    manager.prefix_cache_stats = PrefixCacheStats()
    engine.add("a", 100, max_tokens=3)
    engine.add("b", 8, max_tokens=3)
    sent = []
    while scheduler.requests:
        engine.schedule()
        step = engine.in_flight.popleft()
        attach(step.result, REPORT)
        outputs = scheduler.update_from_output(step.output, step.result)
        (stats,) = [o.scheduler_stats for o in outputs.values() if o.scheduler_stats]
        assert stats.kv_connector_stats is not None
        sent.append(stats_of(stats.kv_connector_stats))
    assert [stats.report for stats in sent] == [REPORT] * 3
    counters = [stats.counters for stats in sent]
    assert [c.compressed_requests for c in counters] == [{"uniform": 1}, {}, {}]
    assert [c.other_requests for c in counters] == [{"uniform": 1}, {}, {}]
    assert [c.prefills["full"] for c in counters] == [1, 0, 0]
    # A cut's blocks go back when the next step is planned.
    assert [c.cuts["prompt"] for c in counters] == [0, 1, 0]
    assert [c.blocks_freed for c in counters] == [0, 13, 0]
    first, second, last = (stats.blocks for stats in sent)
    # 13 blocks of the long prompt and two for what it keeps, one of the short prompt.
    assert (first.held, first.running_held, first.running_plain) == (16, 16, 14)
    assert (second.held, second.running_held, second.running_plain) == (5, 5, 15)
    assert (last.held, last.running_held, last.running_plain) == (0, 0, 0)
    assert last.free == engine.total


@pytest.fixture
def registry() -> Iterator[None]:
    yield
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("vllm:"):
            REGISTRY.unregister(collector)


def value(name: str, engine: int, **labels: str) -> float | None:
    """A sample whatever the model's name."""
    wanted = {"engine": str(engine), **labels}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name and wanted.items() <= sample.labels.items():
                return float(sample.value)
    return None


@pytest.mark.usefixtures("registry")
def test_a_server_of_several_engines_shows_each_ones_figures(folder: Path) -> None:
    config = configure(folder)
    loggers = StatLoggerManager(config, [0, 1], custom_stat_loggers=[LoggingStatLogger])
    for engine, times in ((0, 1), (1, 2)):
        for _ in range(times):
            sent = SchedulerStats(num_running_reqs=4 + engine)
            attach_stats(sent, STATS)
            loggers.record(over_zmq(sent), None, engine_idx=engine)
    loggers.log()
    for engine, times in ((0, 1), (1, 2)):
        assert value("vllm:num_requests_running", engine) == 4 + engine
        assert value("vllm:kv_compression_blocks_reserved", engine) == 5
        assert value("vllm:kv_compression_blocks_freed_total", engine) == 11 * times
        assert value("vllm:kv_compression_cuts_total", engine, kind="decode") == 4 * times
        assert value("vllm:kv_compression_fallbacks_total", engine, method="cake") == 2 * times
        name = "vllm:kv_compression_layer_tokens_kept_total"
        assert value(name, engine, layer="0") == 300 * times
        assert value("vllm:kv_compression_layer_kept_share", engine, layer="0") == 300 / 800
    # What an offline LLM's get_metrics() returns.
    offline: dict[str, Any] = {
        m.name: m for m in get_metrics_snapshot() if m.labels.get("engine") == "0"
    }
    assert offline["vllm:kv_compression_ratio"].value == 4
    assert offline["vllm:kv_compression_phase_time_seconds"].count == 1


SEVERAL = """
import os

from prometheus_client import CollectorRegistry, multiprocess

from tests.engine.test_compression_stats import steps
from vllm_kvcompress.engine.metrics import CompressionMetrics

for server in (0, 1):
    if not os.fork():
        metrics = CompressionMetrics("model")
        for stats in steps()[server::2]:
            metrics.observe(stats, 0)
        os._exit(0)
    os.wait()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
for family in registry.collect():
    for sample in family.samples:
        own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
        print(sample.name.removeprefix("vllm:kv_compression_"), *own.values(), sample.value)
"""
"""Two API servers that get a scheduler's figures in turn; prints what /metrics adds up to."""


def steps() -> list[CompressionStats]:
    """What a scheduler sends for twenty steps: in each a prompt is cut."""
    shares, sent = LayerShares(), []
    for step in range(1, 21):
        report = CutReport([("move", 0.5)], {"cake": 100}, {"cake": 30}, [step, 60 - step])
        counters = CompressionCounters(blocks_freed=7, cuts={"prompt": 1})
        blocks = BlockGauges(held=step, reserved=step, free=7, running_held=2, running_plain=step)
        sent.append(CompressionStats(blocks, counters, report, shares.add(report)))
    return sent


def test_several_servers_add_up_to_what_one_would_show(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    found = {name: float(number) for name, _, number in lines}
    assert found["cuts_total prompt"] == 20
    assert found["blocks_freed_total"] == 140
    assert found["prompt_tokens_seen_total cake"] == 2000
    assert found["layer_tokens_kept_total 0"] == 210
    assert found["phase_time_seconds_count move"] == 20
    # States are those of the last step.
    assert (found["blocks_held"], found["ratio"]) == (20, 10)
    assert found["layer_kept_share 0"] == 210 / 2000
    assert found["layer_kept_share 1"] == (60 * 20 - 210) / 2000


@pytest.mark.usefixtures("registry")
def test_an_engine_without_compression_shows_none(folder: Path) -> None:
    configure(folder)  # compression is on for another engine of this process
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, load_format="dummy")
    loggers = StatLoggerManager(arguments.create_engine_config())
    loggers.record(SchedulerStats(num_running_reqs=4), None)
    assert value("vllm:num_requests_running", 0) == 4
    assert not [m for m in get_metrics_snapshot() if "kv_compression" in m.name]

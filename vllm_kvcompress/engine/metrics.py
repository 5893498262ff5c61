"""What compression does, on the server's /metrics.

vLLM's SchedulerStats travels from the engine's process to the server's once a step. It has one
free-form field, a count of requests by the stage of a remote fetch; connectors are refused, so the
field is ours to use. vLLM's own loggers look up stages that they know and leave the rest alone.
"""

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcompress.engine.settings import compression_of
from vllm_kvcompress.eviction.measurements import Report

_MARK = "_kv_compression_wrapped"
_OURS = "_kv_compression_metrics"
_PREFIX = "kv_compression:"
_NAME = "vllm:kv_compression_"

GAUGES = {
    "blocks_held": "KV-cache blocks that requests hold.",
    "blocks_reserved": "KV-cache blocks that requests hold or have been promised.",
    "blocks_free": "KV-cache blocks that can be handed out.",
}
COUNTERS = {
    "blocks_freed": ("blocks_freed", {}, "KV-cache blocks given back by compression."),
    "prefills_full": ("prefills", {"path": "full"}, "Compressed prompts by where they lay."),
    "prefills_cascade": ("prefills", {"path": "cascade"}, ""),
    "prefills_streaming": ("prefills", {"path": "streaming"}, ""),
    "cuts_prompt": ("cuts", {"kind": "prompt"}, "Compressions by when they were made."),
    "cuts_chunk": ("cuts", {"kind": "chunk"}, ""),
    "cuts_decode": ("cuts", {"kind": "decode"}, ""),
}
"""Entry of the books -> name of the metric, its labels, what it says."""

PHASES = ("score", "allocate", "select", "move")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histograms' buckets."""


def attach_stats(stats: SchedulerStats, books: Mapping[str, int], report: Report) -> None:
    """Let the scheduler's books and a worker's report travel with its stats. Mutates stats."""
    entries = dict(books)
    entries |= {f"report:{name}": count for name, count in report.counts.items()}
    entries |= {f"lap:{phase}:{i}": us for i, (phase, us) in enumerate(report.laps)}
    stats.num_kv_fetch_reqs_by_stage.update({_PREFIX + k: v for k, v in entries.items()})


def stats_of(stats: SchedulerStats) -> dict[str, int]:
    """Return what came with a scheduler's stats; empty if there is nothing."""
    entries = stats.num_kv_fetch_reqs_by_stage.items()
    return {k.removeprefix(_PREFIX): v for k, v in entries if k.startswith(_PREFIX)}


class CompressionMetrics:
    """Prometheus metrics of the engines of one server.

    Args:
        model_name: Label.

    """

    def __init__(self, model_name: str) -> None:
        labels = ["model_name", "engine"]
        self._model_name = model_name
        self._gauges = {name: _gauge(name, text, labels) for name, text in GAUGES.items()}
        self._ratio = _gauge(
            "ratio",
            "Blocks that running requests would hold without compression, by blocks they hold.",
            labels,
        )
        self._counters: dict[str, Counter] = {}
        for name, extra, text in COUNTERS.values():
            if name not in self._counters:
                self._counters[name] = Counter(_NAME + name, text, [*labels, *extra])
        self._requests = Counter(
            f"{_NAME}requests",
            "Admitted requests by method, and whether their prompt was to be compressed.",
            [*labels, "method", "compressed"],
        )
        self._seen = Counter(
            f"{_NAME}prompt_tokens_seen", "Tokens of compressed prompts.", [*labels, "method"]
        )
        self._kept = Counter(
            f"{_NAME}prompt_tokens_kept",
            "Tokens of compressed prompts that an average layer has kept.",
            [*labels, "method"],
        )
        self._layers = Counter(
            f"{_NAME}layer_tokens_kept",
            "Tokens of compressed prompts that a layer has kept.",
            [*labels, "layer"],
        )
        self._share = _gauge(
            "layer_kept_share",
            "Share of the tokens of all compressed prompts that a layer has kept.",
            [*labels, "layer"],
        )
        self._time = Histogram(
            f"{_NAME}phase_time_seconds",
            "Time of one compression on the host, by phase.",
            [*labels, "phase"],
            buckets=SECONDS,
        )
        self._last: dict[tuple[int, str], int] = {}
        self._layer_sums: dict[tuple[int, str], int] = {}
        self._seen_sums: dict[int, int] = {}

    def observe(self, books: Mapping[str, int], engine: int) -> None:
        """Take in one engine's books. Mutates the metrics.

        Args:
            books: As from :func:`stats_of`.
            engine: Its index.

        """
        own = {"model_name": self._model_name, "engine": str(engine)}
        for name, gauge in self._gauges.items():
            gauge.labels(**own).set(books[name])
        held = books["running_held"]
        self._ratio.labels(**own).set(books["running_plain"] / held if held else 1.0)
        for entry, (name, extra, _) in COUNTERS.items():
            self._counters[name].labels(**own, **extra).inc(self._since(engine, entry, books))
        reported = False
        for entry in books:
            kind, _, rest = entry.partition(":")
            if kind == "requests":
                method, _, compressed = rest.rpartition(":")
                self._requests.labels(**own, method=method, compressed=compressed).inc(
                    self._since(engine, entry, books)
                )
            elif kind == "lap":
                phase = rest.partition(":")[0]
                self._time.labels(**own, phase=phase).observe(books[entry] / 1e6)
            elif kind == "report":
                self._take(own, engine, rest, books[entry])
                reported = True
        if reported:
            self._tell_shares(own, engine)

    def _take(self, own: Mapping[str, str], engine: int, entry: str, count: int) -> None:
        kind, _, which = entry.partition(":")
        if kind == "layer":
            self._layers.labels(**own, layer=which).inc(count)
            key = (engine, which)
            self._layer_sums[key] = self._layer_sums.get(key, 0) + count
        elif kind == "seen":
            self._seen.labels(**own, method=which).inc(count)
            self._seen_sums[engine] = self._seen_sums.get(engine, 0) + count
        else:
            self._kept.labels(**own, method=which).inc(count)

    def _tell_shares(self, own: Mapping[str, str], engine: int) -> None:
        for (other, layer), kept in self._layer_sums.items():
            if other == engine:
                share = kept / self._seen_sums[engine]
                self._share.labels(**own, layer=layer).set(share)

    def _since(self, engine: int, entry: str, books: Mapping[str, int]) -> int:
        """How much an entry that only grows has grown since it was last seen. Mutates the sums."""
        before = self._last.get((engine, entry), 0)
        self._last[engine, entry] = books[entry]
        return books[entry] - before


def _gauge(name: str, text: str, labels: list[str]) -> Gauge:
    return Gauge(_NAME + name, text, labels, multiprocess_mode="mostrecent")


def register_metrics() -> None:
    """Show the books of engines with compression on where vLLM shows its metrics; idempotent."""
    if getattr(PrometheusStatLogger, _MARK, False):
        return
    setattr(PrometheusStatLogger, _MARK, True)
    make, record = PrometheusStatLogger.__init__, PrometheusStatLogger.record

    @functools.wraps(make)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        make(self, vllm_config, *args, **kwargs)
        if compression_of(vllm_config) is not None:
            setattr(self, _OURS, CompressionMetrics(vllm_config.model_config.served_model_name))

    @functools.wraps(record)
    def recording(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> Any:
        ours = getattr(self, _OURS, None)
        books = stats_of(scheduler_stats) if ours is not None and scheduler_stats else None
        if ours is not None and books:
            ours.observe(books, kwargs.get("engine_idx", 0))
        return record(self, scheduler_stats, *args, **kwargs)

    PrometheusStatLogger.__init__ = init
    PrometheusStatLogger.record = recording

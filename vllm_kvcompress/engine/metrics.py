"""The scheduler's books on the server's /metrics.

vLLM's SchedulerStats travels from the engine's process to the server's once a step. It has one
free-form field, a count of requests by the stage of a remote fetch; connectors are refused, so the
field is ours to use. vLLM's own loggers look up stages that they know and leave the rest alone.
"""

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcompress.engine.settings import compression_of

_MARK = "_kv_compression_wrapped"
_OURS = "_kv_compression_metrics"
_PREFIX = "kv_compression:"

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


def put_books(stats: SchedulerStats, books: Mapping[str, int]) -> None:
    """Let the scheduler's books travel with its stats. Mutates stats."""
    stats.num_kv_fetch_reqs_by_stage.update({_PREFIX + k: v for k, v in books.items()})


def books_of(stats: SchedulerStats) -> dict[str, int]:
    """Return the books that came with a scheduler's stats; empty if there are none."""
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
        self._gauges = {
            name: Gauge(f"vllm:kv_compression_{name}", text, labels, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._counters: dict[str, Counter] = {}
        for name, extra, text in COUNTERS.values():
            if name not in self._counters:
                full = f"vllm:kv_compression_{name}"
                self._counters[name] = Counter(full, text, [*labels, *extra])
        self._last: dict[tuple[int, str], int] = {}

    def observe(self, books: Mapping[str, int], engine: int) -> None:
        """Take in one engine's books. Mutates the metrics.

        Args:
            books: As from :func:`books_of`.
            engine: Its index.

        """
        own = {"model_name": self._model_name, "engine": str(engine)}
        for name, gauge in self._gauges.items():
            gauge.labels(**own).set(books[name])
        for entry, (name, extra, _) in COUNTERS.items():
            before = self._last.get((engine, entry), 0)
            self._counters[name].labels(**own, **extra).inc(books[entry] - before)
            self._last[engine, entry] = books[entry]


def export_books() -> None:
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
        books = books_of(scheduler_stats) if ours is not None and scheduler_stats else None
        if ours is not None and books:
            ours.observe(books, kwargs.get("engine_idx", 0))
        return record(self, scheduler_stats, *args, **kwargs)

    PrometheusStatLogger.__init__ = init
    PrometheusStatLogger.record = recording

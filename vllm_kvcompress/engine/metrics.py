"""What compression does, on the server's /metrics."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_kvcompress.engine.compression_stats import SLOT, CompressionStats, stats_of
from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.settings import compression_of

_NAME = "vllm:kv_compression_"
_LABELS = ["model_name", "engine"]

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram's buckets."""


class CompressionMetrics:
    """Prometheus metrics of the engines of one server.

    Args:
        model_name: Value of the label of that name.

    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._held = _gauge("blocks_held", "KV-cache blocks that requests hold.")
        self._reserved = _gauge(
            "blocks_reserved", "KV-cache blocks that requests hold or have been promised."
        )
        self._free = _gauge("blocks_free", "KV-cache blocks that can be handed out.")
        self._ratio = _gauge(
            "ratio",
            "Blocks that running requests would hold without compression, by blocks they hold.",
        )
        self._freed = _counter("blocks_freed", "KV-cache blocks given back by compression.")
        self._prefills = _counter("prefills", "Compressed prompts by where they lay.", "path")
        self._cuts = _counter("cuts", "Compressions by when they were made.", "kind")
        self._requests = _counter(
            "requests",
            "Admitted requests by method, and whether their prompt was to be compressed.",
            "method",
            "compressed",
        )
        self._seen = _counter("prompt_tokens_seen", "Tokens of compressed prompts.", "method")
        self._kept = _counter(
            "prompt_tokens_kept",
            "Tokens of compressed prompts that an average layer has kept.",
            "method",
        )
        self._layers = _counter(
            "layer_tokens_kept", "Tokens of compressed prompts that a layer has kept.", "layer"
        )
        self._fallbacks = _counter(
            "fallbacks",
            "Compressions in which the method failed, and the most recent tokens were kept.",
            "method",
        )
        self._share = _gauge(
            "layer_kept_share",
            "Share of the tokens of all compressed prompts that a layer has kept.",
            "layer",
        )
        self._time = Histogram(
            f"{_NAME}phase_time_seconds",
            "Time of one compression on the host, by phase.",
            [*_LABELS, "phase"],
            buckets=SECONDS,
        )

    def observe(self, stats: CompressionStats, engine: int) -> None:
        """Take in what one engine has sent. Mutates the metrics.

        Args:
            stats: Its figures.
            engine: Its index.

        """
        own = {"model_name": self._model_name, "engine": str(engine)}
        blocks, counters, report = stats.blocks, stats.counters, stats.report
        self._held.labels(**own).set(blocks.held)
        self._reserved.labels(**own).set(blocks.reserved)
        self._free.labels(**own).set(blocks.free)
        held = blocks.running_held
        self._ratio.labels(**own).set(blocks.running_plain / held if held else 1.0)
        self._freed.labels(**own).inc(counters.blocks_freed)
        for path, count in counters.prefills.items():
            self._prefills.labels(**own, path=path).inc(count)
        for kind, count in counters.cuts.items():
            self._cuts.labels(**own, kind=kind).inc(count)
        for method, count in counters.compressed_requests.items():
            self._requests.labels(**own, method=method, compressed="true").inc(count)
        for method, count in counters.other_requests.items():
            self._requests.labels(**own, method=method, compressed="false").inc(count)
        for phase, seconds in report.phase_times:
            self._time.labels(**own, phase=phase).observe(seconds)
        for method, count in report.tokens_seen.items():
            self._seen.labels(**own, method=method).inc(count)
        for method, count in report.tokens_kept.items():
            self._kept.labels(**own, method=method).inc(count)
        for method, count in report.fallbacks.items():
            self._fallbacks.labels(**own, method=method).inc(count)
        for layer, count in enumerate(report.layer_tokens_kept):
            self._layers.labels(**own, layer=str(layer)).inc(count)
        for layer, share in enumerate(stats.layer_shares):
            self._share.labels(**own, layer=str(layer)).set(share)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    # Of several servers, the one that was told last knows an engine's state.
    return Gauge(_NAME + name, text, [*_LABELS, *labels], multiprocess_mode="mostrecent")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(_NAME + name, text, [*_LABELS, *labels])


class CompressionProm(KVConnectorProm):
    """Shows the payload of a KV connector on /metrics, or ours in its place.

    Args:
        vllm_config: The engines' configuration.
        labelnames: Names of vLLM's labels.
        per_engine_labelvalues: Their values, by index of the engine.

    """

    def __init__(
        self,
        vllm_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, labelnames, per_engine_labelvalues)
        self._metrics: CompressionMetrics | None = None
        if compression_of(vllm_config) is not None:
            self._metrics = CompressionMetrics(vllm_config.model_config.served_model_name)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        if self._metrics is not None and SLOT in transfer_stats_data:
            self._metrics.observe(stats_of(transfer_stats_data), engine_idx)
        else:
            super().observe(transfer_stats_data, engine_idx)


def register_metrics() -> None:
    """Show the figures of engines with compression on where vLLM shows its own; idempotent."""
    # Not by the entry points vllm.stat_logger_plugins: they are read by AsyncLLM alone, so that an
    # offline LLM would count nothing, and being installed they switch statistics on for servers
    # that were started with --disable-log-stats and without compression.
    PrometheusStatLogger._kv_connector_cls = CompressionProm

    def leave_ours(original: Any) -> Any:
        def observe(self: Any, transfer_stats_data: dict[str, Any]) -> None:
            # vLLM's log lines would look for the connector that has sent it.
            if SLOT not in transfer_stats_data:
                original(self, transfer_stats_data)

        return observe

    wrap_once(KVConnectorLogging, "observe", leave_ours)

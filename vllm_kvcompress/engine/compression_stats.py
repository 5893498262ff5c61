"""The figures of one engine, as they travel from its scheduler to the server's /metrics.

The worker's CutReport comes to the scheduler with the output of a step. The scheduler adds its own
figures and puts all of them into vLLM's SchedulerStats of that step, which vLLM sends to the server
(through ZMQ and msgpack, if the engine runs in a process of its own). Of several servers, each
step's figures go to one, and Prometheus adds up what the servers have counted: what is sent counts
from one step to the next, never from the start.

SchedulerStats has one field for a payload that vLLM does not know: that of a KV connector.
Connectors are refused beside compression, so the field is ours to use.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcompress.eviction.measurements import CutReport

SLOT = "kv_compression"
"""The payload's only key."""

PATHS = ("full", "cascade", "streaming")
"""Where a compressed prompt lies while it is computed."""
CUT_KINDS = ("prompt", "chunk", "decode")
"""When a cut is made: at a prompt's end, between two chunks of it, in generated tokens."""


@dataclass(frozen=True)
class BlockGauges:
    """KV-cache blocks at one moment.

    Attributes:
        held: Held by requests.
        reserved: Held by requests or reserved for them.
        free: Free to be handed out.
        running_held: Held by running requests in the groups that are compressed.
        running_plain: What these requests would hold there in plain vLLM.

    """

    held: int
    reserved: int
    free: int
    running_held: int
    running_plain: int


@dataclass
class CompressionCounters:
    """What a scheduler has counted since it last sent its figures.

    Attributes:
        blocks_freed: KV-cache blocks given back by compression.
        prefills: Compressed prompts by path, see :data:`PATHS`.
        cuts: Cuts by kind, see :data:`CUT_KINDS`.
        compressed_requests: Requests by method, those whose prompt is to be compressed.
        other_requests: Requests by method, all others.

    """

    blocks_freed: int = 0
    prefills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATHS, 0))
    cuts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CUT_KINDS, 0))
    compressed_requests: dict[str, int] = field(default_factory=Counter)
    other_requests: dict[str, int] = field(default_factory=Counter)


@dataclass(frozen=True)
class CompressionStats:
    """All figures of one engine and step.

    Attributes:
        blocks: Blocks after the step.
        counters: What the scheduler has counted since the last step's figures.
        report: What the worker has measured since its last report.
        layer_shares: Of each layer, the share that it kept of all tokens of compressed prompts up
            to now; empty if the report has none.

    """

    blocks: BlockGauges
    counters: CompressionCounters
    report: CutReport
    layer_shares: list[float] = field(default_factory=list)


class LayerShares:
    """The sums behind ``layer_shares``, which no server can make: none gets all reports."""

    def __init__(self) -> None:
        self._seen = 0
        self._kept: list[int] = []

    def add(self, report: CutReport) -> list[float]:
        """Take in a report. Mutates the sums; returns the shares, none if it has no prompt."""
        if not report.layer_tokens_kept:
            return []
        self._seen += sum(report.tokens_seen.values())
        before = self._kept or [0] * len(report.layer_tokens_kept)
        self._kept = [a + b for a, b in zip(before, report.layer_tokens_kept, strict=True)]
        return [kept / self._seen for kept in self._kept]


def attach_stats(scheduler_stats: SchedulerStats, stats: CompressionStats) -> None:
    """Send figures along with a scheduler's. Mutates scheduler_stats."""
    scheduler_stats.kv_connector_stats = {SLOT: stats}


def stats_of(payload: dict[str, Any]) -> CompressionStats:
    """Return the figures that came as a payload.

    Args:
        payload: SchedulerStats' kv_connector_stats as they have arrived.

    Raises:
        msgspec.ValidationError: They are not what :func:`attach_stats` sent.

    """
    # msgpack makes dicts of dataclasses whose type the receiver's decoder was not told.
    return msgspec.convert(payload[SLOT], CompressionStats)

"""What is told of each cut: measurements for the scheduler, a log line, a record for inspection."""

import json
import logging
import time
from collections.abc import Sequence

from torch import Tensor

from vllm_kvcompress.eviction.apportionment import Floats
from vllm_kvcompress.eviction.measurements import CutReport
from vllm_kvcompress.eviction.records import CutRecord, make_record
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.methods import LayerScores, MethodError
from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.compression_schedule import Cut

# A child of vLLM's logger, so that its handlers and level apply.
logger = logging.getLogger("vllm.kvcompress.compressor")


class PhaseTimer:
    """Seconds spent by phase.

    Args:
        laps: Seconds spent so far, by phase; mutated.

    """

    def __init__(self, laps: dict[str, float]) -> None:
        self.laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last call to a phase. Mutates the laps."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class CutReporter:
    """Takes note of the cuts of one worker.

    Args:
        log_requests: Whether to log one JSON line per cut.
        block_size: Tokens per page.

    Attributes:
        seconds: Time spent so far, by phase.
        records: Descriptions of cuts, appended to; None: none are made.
        report: What has been measured; whoever takes it away leaves a new one.
        faults: For each method that has failed for a request, the first reason; whoever takes it
            away leaves a new one.

    """

    def __init__(self, log_requests: bool, block_size: int) -> None:
        self._log_requests = log_requests
        self._block_size = block_size
        self.seconds: dict[str, float] = {}
        self.records: list[CutRecord] | None = None
        self.report = CutReport()
        self.faults: dict[str, str] = {}
        self._failed: set[str] = set()

    def record(
        self,
        request_id: str,
        request: WorkerRequest,
        cut: Cut,
        scores: Sequence[LayerScores],
        tokens: Sequence[Tensor],
        weights: Floats | None,
        fault: MethodError | None = None,
    ) -> None:
        """Describe a cut that is being made, if anybody asked. Mutates the records.

        The cut is the request's last one, behind it; other arguments are as of :func:`make_record`.
        """
        if self.records is None:
            return
        self.records.append(
            make_record(
                request.method,
                scores,
                tokens,
                weights,
                request_id=request_id,
                number=request.cuts_made,
                prompt_len=cut.position,
                block_size=self._block_size,
                fault=fault,
            )
        )

    def note(
        self,
        request_id: str,
        request: WorkerRequest,
        cut: Cut,
        tables: Sequence[IntArray],
        laps: dict[str, float],
        fault: MethodError | None = None,
    ) -> None:
        """Count and log a cut that was just made. Mutates seconds and report.

        Args:
            request_id: The request's id.
            request: The request, this cut behind it.
            cut: The cut.
            tables: Per layer the pages it holds now.
            laps: Seconds it took, by phase.
            fault: What the method has failed with, if it has.

        """
        if fault is not None:
            self._tell(request_id, request, fault)
        for phase, seconds in laps.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.report.phase_times.append((phase, seconds))
        name, size = request.method.name, self._block_size
        pages = [len(own) for own in tables]
        tokens = [count * size - cut.slack for count in pages]
        if request.schedule is not None and request.schedule.kind(request.cuts_made) == "prompt":
            self.report.add_prompt(name, cut.position, tokens)
        if not self._log_requests:
            return
        line = {
            "request": request_id,
            "method": name,
            "cut": request.cuts_made,
            "cascade": request.prefill_blocks is not None and request.cuts_made == 1,
            "prompt_tokens": request.prompt_len,
            "text_tokens": cut.position,
            "block_size": size,
            "blocks_before": cdiv(cut.position, size),
            "blocks_after": cut.blocks,
            "pages_per_layer": pages,
            "tokens_per_layer": tokens,
            "seconds": {k: round(v, 4) for k, v in laps.items()},
        }
        if fault is not None:
            line["fallback"] = str(fault)
        logger.info("KVCOMPRESS %s", json.dumps(line))

    def tell_of_neighbour(
        self, request_id: str, request: WorkerRequest, fault: MethodError
    ) -> None:
        """Log a fault in a call for several requests that this one alone does not have."""
        logger.warning(
            "method %s failed while request %s was cut beside others, and not for it alone: %s",
            request.method.name,
            request_id,
            fault,
        )

    def tell_of_warm_up(self, method: str, fault: MethodError) -> None:
        """Log a fault that no request has met, with the traceback once a method."""
        logger.error(
            "method %s failed while kernels were warmed up: %s",
            method,
            fault,
            exc_info=self._first_of(method, fault),
        )

    def _tell(self, request_id: str, request: WorkerRequest, fault: MethodError) -> None:
        """Count a fault, and log it once a request, with the traceback once a method."""
        name = request.method.name
        self.report.fallbacks[name] += 1
        self.faults.setdefault(name, str(fault))
        if request.told_of_fault:
            return
        request.told_of_fault = True
        logger.error(
            "method %s failed for request %s, which keeps its most recent tokens instead: %s",
            name,
            request_id,
            fault,
            exc_info=self._first_of(name, fault),
        )

    def _first_of(self, method: str, fault: MethodError) -> MethodError | None:
        """The fault if it is the method's first one."""
        if method in self._failed:
            return None
        self._failed.add(method)
        return fault

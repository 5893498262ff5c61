"""Notes in which mode our code runs while one of vLLM's workers is at work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


class InferenceWatch:
    """Wraps whatever of ours a worker calls; once a process.

    Attributes:
        inside: Names of what was called in inference mode.
        outside: Names of what was called outside of it.

    """

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.outside: set[str] = set()
        self._depth = 0
        self._installed = False

    def install(self) -> None:
        """Begin. Mutates classes of ours."""
        if self._installed:
            return
        self._installed = True
        # Not imported with the module: the kernels' tests arrange for Triton's interpreter first.
        from vllm_kvcompress.engine.attention import common, cpu_codec
        from vllm_kvcompress.engine.step.session import Session
        from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker
        from vllm_kvcompress.engine.worker.gpu_worker import ArenaGPUWorker
        from vllm_kvcompress.eviction import (
            cascade_prefill,
            compressor,
            decode_query_buffer,
            layerwise,
            query_collector,
            request_scorer,
            shared_cuts,
        )
        from vllm_kvcompress.methods import Method
        from vllm_kvcompress.paging import arena, device_page_tables, page_tables, strided_codec

        for worker in (ArenaWorker, ArenaGPUWorker):
            self._wrap(worker, self._at_work)
        for ours in (
            Session,
            common.ArenaBuilder,
            common.ArenaImpl,
            cpu_codec.CpuPageCodec,
            cascade_prefill.CascadePrefill,
            compressor.Compressor,
            decode_query_buffer.DecodeQueryBuffer,
            layerwise.LayerwiseEviction,
            query_collector.QueryCollector,
            request_scorer.RequestScorer,
            shared_cuts.SharedCuts,
            arena.PageArena,
            device_page_tables.DeviceTableBuilder,
            page_tables.TableBuilder,
            strided_codec.StridedPageCodec,
        ):
            self._wrap(ours, self._noted)
        for name in ("score", "weights"):  # others are for planning
            setattr(Method, name, self._noted(vars(Method)[name]))

    def _wrap(self, owner: Any, wrapper: Callable[[Any], Any]) -> None:
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function):
                setattr(owner, name, wrapper(function))

    def _at_work(self, function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return wrapped

    def _noted(self, function: Any) -> Any:
        name = function.__qualname__

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # Tests call our code, too.
            if self._depth:
                (self.inside if torch.is_inference_mode_enabled() else self.outside).add(name)
            return function(*args, **kwargs)

        return wrapped


WATCH = InferenceWatch()
"""That of this process."""

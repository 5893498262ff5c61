"""vLLM's CPU worker with a compression session around each step, for both model runners."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.arena import PageGeometry
from vllm_kvcompress.config import Planner
from vllm_kvcompress.engine.backend import (
    ArenaCPUBackend,
    ArenaCPUImpl,
    ArenaCPUMetadataBuilder,
)
from vllm_kvcompress.engine.checks import check_specs
from vllm_kvcompress.engine.codec import CpuPageCodec
from vllm_kvcompress.engine.compressor import LayerFacts
from vllm_kvcompress.engine.session import Session
from vllm_kvcompress.engine.settings import planner_of

logger = init_logger("vllm.kvcompress.worker")


class ArenaCPUWorker(CPUWorker):
    """CPU worker of an engine with compression on."""

    _session: Session

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See the base class; puts our backend in place before layers choose theirs."""
        path = f"{ArenaCPUBackend.__module__}.{ArenaCPUBackend.__qualname__}"
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
        # The choice is remembered per process, perhaps from an engine without compression.
        selector._cached_get_attn_backend.cache_clear()
        super().load_model(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """See the base class; refuses models whose layers cannot share one arena."""
        with set_current_vllm_config(self.vllm_config):
            specs = super().get_kv_cache_spec()
        layers = self.vllm_config.compilation_config.static_forward_context
        check_specs(specs, {name: layers[name] for name in specs}, ArenaCPUImpl)
        return specs

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """See the base class; then lays the arena over the cache."""
        super().initialize_from_config(kv_cache_config)
        (group,) = kv_cache_config.kv_cache_groups
        layers = [
            self.vllm_config.compilation_config.static_forward_context[name]
            for name in group.layer_names
        ]
        flat, geometry = flat_view([layer.kv_cache for layer in layers])
        planner = planner_of(self.vllm_config, group.kv_cache_spec.block_size)
        if geometry.block_size != planner.block_size:
            raise ValueError(
                f"the attention kernel splits blocks of {planner.block_size} into "
                f"{geometry.block_size}; start with --block-size {geometry.block_size}"
            )
        first = layers[0]
        dtype = self.model_config.dtype
        self._session = Session(
            planner,
            geometry,
            flat,
            CpuPageCodec(flat, first.isa, self.cache_config.cache_dtype, dtype),
            [_layer_facts(layer.impl) for layer in layers],
            first.impl.num_heads,
            dtype,
        )
        for index, layer in enumerate(layers):
            layer.impl.session = self._session
            layer.impl.arena_layer = index
        request_ids = self._row_reader()
        for attn_group in self.model_runner.attn_groups[0]:
            for builder in attn_group.metadata_builders:
                assert isinstance(builder, ArenaCPUMetadataBuilder), type(builder)
                builder.session = self._session
                builder.request_ids = request_ids
        _announce(planner, self.model_config.max_model_len, kv_cache_config.num_blocks)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """See the base class; compresses the prompts that this step completed."""
        self._session.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._session.end_step()
        return output

    def kv_compression_check_integrity(self) -> None:
        """For collective_rpc: raises IntegrityError if the arena's books do not add up."""
        self._session.check_integrity()

    def kv_compression_stats(self) -> dict[str, int]:
        """For collective_rpc: requests compressed and in the arena, steps of either kind."""
        return {**self._session.stats, "in_arena": len(self._session.arena)}

    def kv_compression_pages(self) -> dict[str, list[int]]:
        """For collective_rpc: pages per layer of every request in the arena."""
        arena = self._session.arena
        return {r: arena.pages_per_layer(r).tolist() for r in arena.request_ids()}

    def _row_reader(self) -> Callable[[int], Sequence[str]]:
        """Return a function from the batch's size to its requests in row order."""
        runner: Any = self.model_runner
        if hasattr(runner, "prepare_attn"):  # model runner V2
            batch: list[Sequence[str]] = [()]
            prepare = runner.prepare_attn

            def prepare_attn(input_batch: Any) -> Any:
                batch[0] = input_batch.req_ids
                return prepare(input_batch)

            runner.prepare_attn = prepare_attn
            return lambda num_rows: batch[0][:num_rows]
        if hasattr(runner, "input_batch"):  # model runner V1
            return lambda num_rows: runner.input_batch.req_ids[:num_rows]
        raise ValueError(
            f"model runner {type(runner).__name__} is not supported with --kv-compression; "
            "use vLLM 0.32's model runner V1 or V2"
        )


def flat_view(caches: Sequence[Tensor]) -> tuple[Tensor, PageGeometry]:
    """Lay one view over all layers' caches, in which any page can serve any layer.

    Args:
        caches: Per layer [num_blocks, N, block_size, C], all in one allocation.

    Returns:
        The view [pages, N, block_size, C] and where each layer's pages lie in it.

    Raises:
        ValueError: The layers' pages are not spread evenly over one allocation.

    """
    first = min(caches, key=lambda c: c.data_ptr())
    page = first[0]
    size = page.numel() * page.element_size()
    step, rest = divmod(first.stride(0), page.numel())
    offsets = [c.data_ptr() - first.data_ptr() for c in caches]
    same = all(
        c.shape == first.shape
        and c.stride() == first.stride()
        and c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for c in caches
    )
    if not same or rest or not page.is_contiguous() or any(o % size for o in offsets):
        raise ValueError(
            "this KV-cache layout is not supported with --kv-compression; "
            "unset VLLM_KV_CACHE_LAYOUT"
        )
    origin = np.asarray([o // size for o in offsets], dtype=np.int64)
    pages = int(origin.max()) + (first.shape[0] - 1) * step + 1
    shape = (pages, *first.shape[1:])
    stride = (page.numel(), *first.stride()[1:])
    flat = first.as_strided(shape, stride, first.storage_offset())
    geometry = PageGeometry(origin, step, num_blocks=first.shape[0], block_size=first.shape[2])
    return flat, geometry


def _layer_facts(impl: Any) -> LayerFacts:
    sinks = impl.sinks
    return LayerFacts(
        scale=float(impl.scale),
        soft_cap=float(impl.logits_soft_cap or 0.0),
        sinks=sinks.to(torch.float32) if sinks is not None else None,
    )


def _announce(planner: Planner, max_model_len: int, num_blocks: int) -> None:
    config, size = planner.config, planner.block_size
    plan = planner.plan(max_model_len)
    plain = -(-max_model_len // size)
    held = plan.arena_blocks if plan else plain
    logger.info(
        "KV-cache compression is on: %s, budget %s%s; a prompt of max_model_len %d tokens holds "
        "%d blocks of %d after its prefill instead of %d (%d while its prefill runs), "
        "of %d in the pool",
        config.method,
        config.budget,
        f" of the prompt (at least {planner.window + size} tokens per layer)"
        if isinstance(config.budget, float)
        else " tokens per layer",
        max_model_len,
        held,
        size,
        plain,
        plain + (held if plan else 0),
        num_blocks - 1,
    )

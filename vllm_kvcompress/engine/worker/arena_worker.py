"""A compression session around each step of vLLM's worker, whatever the device."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from vllm_kvcompress.engine.attention import register_backends
from vllm_kvcompress.engine.attention.backend_choice import choose_wrapped
from vllm_kvcompress.engine.attention.common import ArenaBuilder, ArenaImpl
from vllm_kvcompress.engine.checks import check_version
from vllm_kvcompress.engine.compile_cache import share_compiled_models
from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.layer_checks import check_specs
from vllm_kvcompress.engine.model_layers import LayerGroups, layers_of
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.settings import resolver_of
from vllm_kvcompress.engine.step.messages import is_planned
from vllm_kvcompress.engine.step.session import Session
from vllm_kvcompress.engine.worker_hook_table import WORKER_HOOKS
from vllm_kvcompress.eviction.records import CutRecord
from vllm_kvcompress.paging.arena import PageGeometry
from vllm_kvcompress.paging.attention_layer import attention_params
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.block_planner import BlockPlanner

logger = init_logger("vllm.kvcompress.worker")


class ArenaWorker:
    """First base of a wrapped worker of an engine with compression on.

    All that works on tensors runs in inference mode, as vLLM's own steps do: a layer's parameters
    may require gradients (those of gpt-oss do), and what is made in that mode stays in it.

    Attributes:
        backends: Attention backends that a user can choose from.

    """

    backends: Sequence[str] = ()
    vllm_config: Any
    model_runner: Any
    _maybe_get_memory_pool_context: Any
    _session: Session
    _rows: Sequence[str] = ()
    _warms_up = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's Worker; puts our backends in place before layers choose theirs."""
        register_backends()
        share_compiled_models()
        # The choice is remembered per process, perhaps from an engine without compression.
        selector._cached_get_attn_backend.cache_clear()
        choose_wrapped()
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        # What is loaded now is what this device needs: nothing is imported for the check alone.
        check_version(
            {module: WORKER_HOOKS[module] for module in WORKER_HOOKS.keys() & sys.modules}
        )

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """See vLLM's Worker; refuses models whose full-attention layers cannot share one arena."""
        with set_current_vllm_config(self.vllm_config):
            specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        layers = self.vllm_config.compilation_config.static_forward_context
        check_specs(specs, layers, ArenaImpl, self.backends)
        return specs

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """See vLLM's Worker; then lays the arena over the cache."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        # Tables are runtime state as vLLM's are: kept on the host while the engine sleeps.
        with self._maybe_get_memory_pool_context(tag="runtime"):
            self._lay_arena(kv_cache_config)

    @torch.inference_mode()
    def _lay_arena(self, kv_cache_config: KVCacheConfig) -> None:
        config = self.vllm_config
        index = arena_group(kv_cache_config, layers_of(config))
        group = kv_cache_config.kv_cache_groups[index]
        layers = [
            config.compilation_config.static_forward_context[name] for name in group.layer_names
        ]
        flat, geometry = flat_view([layer.kv_cache for layer in layers])
        resolver = resolver_of(config, group.kv_cache_spec.block_size)
        planner = resolver.default_planner
        width = group.kv_cache_spec.max_num_blocks_per_req(
            config, config.model_config.max_model_len
        )
        if own := getattr(self.model_runner, "block_tables", None):  # V2
            # As wide as the runner's, which vLLM rounds up: kernels are compiled for that.
            width = own.input_block_tables[index].shape[1]
        if geometry.block_size != planner.block_size:
            raise ValueError(
                f"the attention kernel splits blocks of {planner.block_size} into "
                f"{geometry.block_size}; start with --block-size {geometry.block_size}"
            )
        first, dtype = layers[0], config.model_config.dtype
        cache_dtype = first.impl.kv_cache_dtype
        limits = TableLimits(
            rows=config.scheduler_config.max_num_seqs,
            width=width,
            tokens=config.scheduler_config.max_num_batched_tokens,
        )
        self._session = Session(
            resolver,
            geometry,
            flat,
            first.impl.make_codec(flat, first, cache_dtype, dtype),
            [attention_params(layer, cache_dtype) for layer in layers],
            first.impl.num_heads,
            dtype,
            partial(first.impl.make_tables, limits=limits, device=flat.device),
            limits,
            index,
        )
        for number, layer in enumerate(layers):
            layer.impl.session = self._session
            layer.impl.arena_layer = number
        request_ids = self._follow_runner()
        for attn_group in self.model_runner.attn_groups[index]:
            for builder in attn_group.metadata_builders:
                assert isinstance(builder, ArenaBuilder), type(builder)
                builder.session = self._session
                builder.request_ids = request_ids
        _announce(planner, config.model_config.max_model_len, kv_cache_config.num_blocks)
        _announce_others(config, planner.block_size)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """See vLLM's Worker; where no sampling follows, makes the cuts that are due."""
        if self._warms_up and not is_planned(scheduler_output):
            # vLLM's own step: the session learns nothing of it, so attention takes plain vLLM's
            # path, and nothing is left of its requests.
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._session.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        return None if output is None else self._cut_and_report(output)

    @torch.inference_mode()
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's Worker; makes the cuts that are due behind the step's own work.

        By then a GPU's tokens are on their way to the host, and do not wait for the cuts' kernels.
        """
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        return self._cut_and_report(output)

    def _cut_and_report(self, output: Any) -> Any:
        """End the step; what was measured goes to the scheduler with its output."""
        self._session.end_step()
        return self._session.report_with(output)

    def kv_compression_record(self, on: bool) -> None:
        """For collective_rpc: begin to describe what is kept at each cut, or stop."""
        self._session.reporter.records = [] if on else None

    def kv_compression_records(self) -> list[CutRecord]:
        """For collective_rpc: the descriptions since the last call."""
        records = self._session.reporter.records or []
        if records:
            self._session.reporter.records = []
        return records

    def kv_compression_faults(self) -> dict[str, str]:
        """For collective_rpc: the methods that have failed since the last call, each with why."""
        reporter = self._session.reporter
        faults, reporter.faults = reporter.faults, {}
        return faults

    def _follow_runner(self) -> Callable[[int], Sequence[str]]:
        """Hook into the runner; return a function from the batch's size to its rows' requests."""
        runner = self.model_runner
        state = getattr(runner, "model_state", None)
        if hasattr(runner, "gather_batch_req_state") and hasattr(state, "prepare_attn"):  # V2
            return _follow_v2(self)
        if hasattr(runner, "input_batch"):  # V1
            return lambda num_rows: runner.input_batch.req_ids[:num_rows]
        raise ValueError(
            f"model runner {type(runner).__name__} is not supported with --kv-compression; "
            "use vLLM 0.32's model runner V1 or V2"
        )


def _follow_v2(worker: ArenaWorker) -> Callable[[int], Sequence[str]]:
    """Note a batch's rows, and whether it replays a FULL CUDA graph, before metadata is built."""

    def make_prepare(original: Any) -> Any:
        def prepare_attn(input_batch: Any, cudagraph_mode: Any, *args: Any, **kwargs: Any) -> Any:
            worker._rows = input_batch.req_ids
            replays = cudagraph_mode == CUDAGraphMode.FULL and not kwargs.get("for_capture")
            worker._session.replays = replays
            return original(input_batch, cudagraph_mode, *args, **kwargs)

        return prepare_attn

    def make_gather(original: Any) -> Any:
        def gather_batch_req_state(*args: Any, **kwargs: Any) -> Any:
            state, uniform = original(*args, **kwargs)
            # A last chunk of one token passes for a decode step, but a replayed graph would not
            # hand out its query. Without a uniform length no FULL decode graph is chosen.
            return state, None if worker._session.collects() else uniform

        return gather_batch_req_state

    wrap_once(worker.model_runner.model_state, "prepare_attn", make_prepare)
    wrap_once(worker.model_runner, "gather_batch_req_state", make_gather)
    return lambda num_rows: worker._rows[:num_rows]


def arena_group(kv_cache_config: KVCacheConfig, layers: LayerGroups) -> int:
    """Return the index of the KV-cache group that is compressed.

    Args:
        kv_cache_config: vLLM's.
        layers: What the model's config says; the scheduler has planned with it.

    Raises:
        ValueError: vLLM has grouped the layers otherwise.

    """
    groups = kv_cache_config.kv_cache_groups
    found = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, ArenaSpec)]
    sizes = [len(groups[i].layer_names) for i in found]
    if sizes != [layers.compressed] or len(groups) != 1 + layers.window_groups:
        raise ValueError(
            f"vLLM has put the layers to be compressed into groups of {sizes} beside "
            f"{len(groups) - len(found)} others, where the model's config says "
            f"[{layers.compressed}] beside {layers.window_groups}, which is not supported with "
            "--kv-compression; drop the flag for this model"
        )
    return found[0]


def flat_view(caches: Sequence[Tensor]) -> tuple[Tensor, PageGeometry]:
    """Lay one view over all layers' caches, in which any page can serve any layer.

    Args:
        caches: Per layer [num_blocks, N, block_size, C] in any physical order that keeps a page in
            one piece, all in one allocation.

    Returns:
        The view [pages, N, block_size, C], strides within a page as they were, and where each
        layer's pages lie in it.

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
    if not same or rest or not _in_one_piece(page) or any(o % size for o in offsets):
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


def _in_one_piece(page: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    inner_first = sorted(zip(page.stride(), page.shape, strict=True))
    expected = 1
    for stride, size in inner_first:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _announce(planner: BlockPlanner, max_model_len: int, num_blocks: int) -> None:
    config, size = planner.config, planner.block_size
    if config.off:
        logger.info("KV-cache compression is on for requests that ask for it")
        return
    cut = planner.prompt_cut(max_model_len)
    plain = cdiv(max_model_len, size)
    logger.info(
        "KV-cache compression is on: %s, budget %s%s, prefill %s; a prompt of max_model_len %d "
        "tokens holds %d blocks of %d after its prefill instead of %d (at least %d while its "
        "prefill runs), of %d in the pool",
        config.method,
        config.budget,
        f" of the prompt (at least {planner.window + size} tokens per layer)"
        if isinstance(config.budget, float)
        else " tokens per layer",
        config.prefill,
        max_model_len,
        cut.blocks if cut else plain,
        size,
        plain,
        planner.peak_blocks(max_model_len, max_model_len),
        num_blocks - 1,
    )


def _announce_others(vllm_config: Any, block_size: int) -> None:
    layers, longest = layers_of(vllm_config), vllm_config.model_config.max_model_len
    if layers.window_groups:
        logger.info(
            "%d layers are compressed; %d groups of sliding-window layers are not and hold up to "
            "%d blocks beside that while such a prompt is read, %d later",
            layers.compressed,
            layers.window_groups,
            layers.window_group_blocks(block_size, longest, vllm_config.max_in_flight_tokens),
            layers.window_group_blocks(block_size, longest, vllm_config.max_concurrent_batches),
        )

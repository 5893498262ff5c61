"""vLLM's GPU worker with compression, under model runner V2."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.engine.attention import GPU_BACKENDS
from vllm_kvcompress.engine.settings import resolver_of
from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker
from vllm_kvcompress.planning.workspace_memory import ModelShape, workspace_bytes

logger = init_logger("vllm.kvcompress.gpu_worker")


class ArenaGPUWorker(ArenaWorker, Worker):
    """GPU worker of an engine with compression on."""

    backends = GPU_BACKENDS
    peak_activation_memory: int
    available_kv_cache_memory_bytes: int

    def determine_available_memory(self) -> int:
        """See vLLM's Worker; leaves room for tables and for scoring a prompt."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes:
            return available  # a size that the user chose, or that vLLM has proposed (see below)
        tables, transient = self._workspace()
        logger.info(
            "KV-cache compression sets %.2f GiB aside: %.2f for the page tables of all layers, and "
            "queries if there is a decode budget (lower --max-num-seqs or raise --block-size to "
            "shrink them), %.2f to score a prompt of max_model_len",
            (tables + transient) / 2**30,
            tables / 2**30,
            transient / 2**30,
        )
        # What vLLM proposes as --kv-cache-memory, and takes itself at the next start if it may
        # (VLLM_ENABLE_STARTUP_PLAN), is all memory but this: whoever follows has room for us.
        self.peak_activation_memory += tables + transient
        self.available_kv_cache_memory_bytes -= tables + transient
        return available - tables - transient

    def compile_or_warm_up_model(self) -> Any:
        """See vLLM's Worker; compiles our kernels before it watches for late compilations.

        It is also before graphs are captured: vLLM then empties torch's cache, so what our longest
        prompt took is free again when the graphs' memory is measured. vLLM's own warm-up runs steps
        that no scheduler has planned; only it may.
        """
        with torch.inference_mode():
            self._session.warm_up(self.model_config.max_model_len)
        self._warms_up = True
        try:
            return super().compile_or_warm_up_model()
        finally:
            self._warms_up = False

    def _workspace(self) -> tuple[int, int]:
        config, model = self.vllm_config, self.model_config
        parallel = config.parallel_config
        resolver = resolver_of(config, self.cache_config.block_size)
        shape = ModelShape(
            layers=resolver.default_planner.limits.num_layers,
            heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            itemsize=model.dtype.itemsize,
        )
        return workspace_bytes(
            resolver,
            shape,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            max_model_len=model.max_model_len,
        )

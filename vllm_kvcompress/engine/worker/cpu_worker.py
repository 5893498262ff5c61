"""vLLM's CPU worker with compression, for both model runners."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker


class ArenaCPUWorker(ArenaWorker, CPUWorker):
    """CPU worker of an engine with compression on."""

"""An engine that is stepped by hand, and what it holds. Written against vLLM 0.32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Prompts = Sequence[Sequence[int]]


class SteppedEngine:
    """An engine, with compression or without.

    Args:
        llm: A ``vllm.LLM`` whose engine core runs in this process.

    """

    def __init__(self, llm: Any) -> None:
        self.llm_engine = llm.llm_engine
        self.core = self.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self._pool = self.scheduler.kv_cache_manager.block_pool

    @property
    def pool_blocks(self) -> int:
        """Blocks that can be handed out: all but the null block."""
        return int(self._pool.num_gpu_blocks) - 1

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the pool as it was allocated."""
        config = self.scheduler.kv_cache_config
        return sum(int(tensor.size) for tensor in config.kv_cache_tensors) // int(config.num_blocks)

    @property
    def blocks_held(self) -> int:
        """Blocks that requests hold now."""
        return self.pool_blocks - int(self._pool.get_num_free_blocks())

    @property
    def phases(self) -> dict[str, float]:
        """Seconds spent on compressing so far, by phase; empty for plain vLLM."""
        session = getattr(self.core.model_executor.driver_worker.worker, "_session", None)
        return {} if session is None else dict(session.reporter.seconds)

    def add(self, prompts: Prompts, generate: int) -> list[Any]:
        """Queue requests.

        Args:
            prompts: Token ids of each.
            generate: Tokens that each generates, whatever they are.

        Returns:
            The scheduler's requests.

        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=generate, ignore_eos=True, detokenize=False
        )
        before = set(self.scheduler.requests)
        for index, prompt in enumerate(prompts):
            self.llm_engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        requests = self.scheduler.requests
        return [requests[name] for name in requests if name not in before]

    def step(self) -> None:
        """Run one step."""
        self.llm_engine.step()

    def stop(self, prompts: Prompts) -> None:
        """Abort the requests of the last :meth:`add` and finish the steps that have begun."""
        self.llm_engine.abort_request([str(index) for index in range(len(prompts))])
        while self.llm_engine.has_unfinished_requests() or self.scheduler.has_requests():
            self.step()

    def close(self) -> None:
        """Shut the engine down."""
        self.llm_engine.engine_core.shutdown()

"""Real engines for tests: made once per settings, stepped by hand, inspected from inside."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("KVC_TEST_MODELS", REPO / "models"))
SMALL = "smollm2-135m-instruct"
QUALITY = "qwen2.5-coder-0.5b-instruct"
HYBRID = "gemma-3-270m"

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 256 << 20,
}


class Engine:
    """One LLM and what tests ask of it.

    Args:
        llm: A ``vllm_kvcompress.LLM`` that runs in this process.
        compressed: Whether compression is on.

    """

    def __init__(self, llm: Any, compressed: bool) -> None:
        self.llm = llm
        self.compressed = compressed
        self._count = 0
        self.caller_id: dict[str, str] = {}

    @property
    def core(self) -> Any:
        """vLLM's engine core."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.core.scheduler

    @property
    def manager(self) -> Any:
        """The manager of the KV-cache group that is compressed, or of the only one."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return managers[getattr(self.scheduler, "_group", 0)]

    @property
    def session(self) -> Any:
        """The worker's compression session."""
        return self.core.model_executor.driver_worker.worker._session

    @property
    def stats(self) -> dict[str, int]:
        """Counters of the session."""
        return dict(self.session.stats)

    def free_blocks(self) -> int:
        """Blocks in the pool's free queue."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def total_blocks(self) -> int:
        """Blocks that can be handed out: all but the null block."""
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def blocks_of(self, request_id: str) -> list[int]:
        """Block ids a request holds by the scheduler's books."""
        return [b.block_id for b in self.manager.req_to_blocks[request_id]]

    def page_contents(self, blocks: Sequence[int]) -> Tensor:
        """Bytes of all layers' pages of some blocks."""
        pages = self.session.arena.geometry.all_pages(list(blocks)).reshape(-1)
        return self.session.flat_cache[torch.from_numpy(pages)].clone()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int] = 32, **params: Any
    ) -> list[list[int]]:
        """Greedy output tokens of prompts that run together."""
        return [list(o.token_ids) for o in self.complete(prompts, max_tokens, **params)]

    def complete(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int] = 32, **params: Any
    ) -> list[Any]:
        """Greedy completions of prompts that run together, as vLLM's CompletionOutput."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(p)} for p in prompts],
            [greedy(n, **params) for n in limits],
            use_tqdm=False,
        )
        return [o.outputs[0] for o in outputs]

    def record_kept(self) -> list[list[list[list[int]]]]:
        """Return a list that from now on gets, per cut and layer, what heads keep.

        Requests whose method keeps everything are not noted.
        """
        kept: list[list[list[list[int]]]] = []

        class Records(list[Any]):
            def append(self, record: Any) -> None:
                kept.append([layer.tolist() for layer in record.kept])

        self.session.records = Records()
        return kept

    def run_counting(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, **params: Any
    ) -> tuple[list[list[int]], list[int]]:
        """Outputs of prompts that run together, and the blocks out of the pool after each step."""
        names = [self.caller_id[self.add(p, max_tokens, **params)] for p in prompts]
        done: dict[str, list[int]] = {}
        held = []
        for outputs in self.steps(5000):
            # Blocks go back when the next step is planned, so these are those of the step itself.
            held.append(self.total_blocks() - self.free_blocks())
            for output in outputs:
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
        return [done[name] for name in names], held

    def add(
        self, prompt: Sequence[int], max_tokens: int = 32, priority: int = 0, **params: Any
    ) -> str:
        """Queue a request; returns its id in the scheduler (outputs carry the caller's)."""
        self._count += 1
        before = set(self.scheduler.requests)
        name = f"test-{self._count}"
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": list(prompt)},
            greedy(max_tokens, **params),
            priority=priority,
        )
        (request_id,) = set(self.scheduler.requests) - before
        self.caller_id[request_id] = name
        return str(request_id)

    def abort(self, request_id: str) -> None:
        """Abort a request that :meth:`add` returned."""
        self.llm.llm_engine.abort_request([self.caller_id[request_id]])

    def steps(self, limit: int = 2000) -> Iterator[list[Any]]:
        """Run step by step until nothing is left."""
        for _ in range(limit):
            if not self.llm.llm_engine.has_unfinished_requests():
                return
            yield self.llm.llm_engine.step()
        raise AssertionError(f"not finished after {limit} steps")

    def drain(self, limit: int = 2000) -> dict[str, list[int]]:
        """Run to the end; output tokens by the ids that callers gave."""
        done: dict[str, list[int]] = {}
        for outputs in self.steps(limit):
            for output in outputs:
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
        return done

    def count_preemptions(self) -> Callable[[], int]:
        """Count from now on; the function returned stops that and says how many there were."""
        scheduler, count = self.scheduler, 0
        original = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        scheduler._preempt_request = counted

        def result() -> int:
            scheduler._preempt_request = original
            return count

        return result

    def check(self) -> None:
        """Books add up on both sides and every block is back."""
        if self.compressed:
            self.manager.check_integrity()
            self.session.check_integrity()
        assert self.free_blocks() == self.total_blocks(), "blocks leaked"


def greedy(max_tokens: int, **params: Any) -> Any:
    """Sampling parameters that always give max_tokens tokens unless told otherwise."""
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params}
    )


class Engines:
    """Engines by their settings, those used last.

    Args:
        limit: How many; one of the small model takes about a gigabyte.

    """

    def __init__(self, limit: int = 5) -> None:
        self._limit = limit
        self._made: dict[str, Engine] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._made.values())

    def close(self) -> None:
        """Shut all engines down and let go of their memory."""
        while self._made:
            self._close(next(iter(self._made)))

    def _close(self, key: str) -> None:
        engine = self._made.pop(key)
        engine.llm.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()

    def get(
        self,
        method: str | None = None,
        budget: int | float | None = None,
        *,
        model: str = SMALL,
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Engine:
        """Return the engine with these settings; every compressed one checks each step.

        Args:
            method: None for plain vLLM.
            budget: As for the LLM.
            model: A folder under models/.
            config: Method parameters.
            settings: vLLM's engine arguments beside :data:`DEFAULTS`.

        """
        key = repr((method, budget, model, config, sorted(settings.items())))
        if key in self._made:
            self._made[key] = self._made.pop(key)  # the last one is the one used last
        else:
            if len(self._made) == self._limit:
                self._close(next(iter(self._made)))
            from vllm_kvcompress import LLM

            path = MODELS / model
            if not path.is_dir():
                raise FileNotFoundError(f"{path} is missing: run scripts/fetch_model.py {model}")
            compression: dict[str, Any] = {}
            if method is not None:
                compression = {
                    "kv_compression": method,
                    "kv_compression_budget": budget,
                    "kv_compression_config": {"check_integrity": True, **(config or {})},
                }
            llm = LLM(str(path), **compression, **{**DEFAULTS, **settings})
            self._made[key] = Engine(llm, compressed=method is not None)
        return self._made[key]

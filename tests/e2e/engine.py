"""One engine that runs in the test's process, and what tests ask of it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


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
        self._before = Counter[str]()
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

    # What tests reach into: one place, so that a new name inside is one edit here.

    @property
    def arena(self) -> Any:
        """Where the worker's compressed requests lie."""
        return self.session.arena

    @property
    def codec(self) -> Any:
        """Reads and writes tokens of pages."""
        return self.session._codec

    @property
    def planner(self) -> Any:
        """The planner of requests that set nothing."""
        return self.session._resolver.default_planner

    def worker_request(self, request_id: str) -> Any:
        """What the worker knows of a request."""
        return self.session._ledger[request_id]

    def watch_cuts(
        self, patch: pytest.MonkeyPatch, seen: Callable[[Any, Any, list[Tensor]], None]
    ) -> None:
        """Call ``seen`` at every cut after a step, before a token moves.

        Args:
            patch: Ends it.
            seen: Called with the held tokens, the pages that each layer has been dealt (None at the
                first cut), and per layer the tokens to be kept.

        """
        from vllm_kvcompress.eviction import compressor as module

        compressor = self.session._compressor
        find_held, select = compressor._held, vars(module)["select_survivors"]
        held: Any = None

        def noting(*args: Any) -> Any:
            nonlocal held
            held = find_held(*args)
            return held

        def telling(*args: Any, **kwargs: Any) -> Any:
            found = select(*args, **kwargs)
            seen(held, kwargs["pages"], found.tokens)
            return found

        patch.setattr(compressor, "_held", noting)
        patch.setattr(module, "select_survivors", telling)

    def _counted(self) -> Counter[str]:
        if not self.compressed:
            return Counter()
        counters = self.manager.counters
        found = Counter({**self.session.stats, "blocks_freed": counters.blocks_freed})
        found.update({f"prefills_{path}": n for path, n in counters.prefills.items()})
        return found

    @property
    def stats(self) -> Counter[str]:
        """Counts of the worker's session and the scheduler's arena since the test began."""
        return Counter({name: n - self._before[name] for name, n in self._counted().items()})

    def begin_test(self) -> None:
        """Forget what earlier tests have left: cached prefixes, counts and whoever listens."""
        assert self.llm.reset_prefix_cache()
        self._before = self._counted()
        if self.compressed:
            self.session.reporter.records = None

    def free_blocks(self) -> int:
        """Blocks in the pool's free queue."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def total_blocks(self) -> int:
        """Blocks that can be handed out: all but the null block."""
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def blocks_of(self, request_id: str) -> list[int]:
        """Block ids that a request holds, as the scheduler has them."""
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

        self.session.reporter.records = Records()
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

    def preempt(self, request_id: str) -> None:
        """Preempt a running request; it will be replayed."""
        request = self.scheduler.requests[request_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)

    def ask(self, prompt: Sequence[int], max_tokens: int, **params: Any) -> tuple[list[int], int]:
        """Greedy tokens of one prompt, and how many of its own came from the prefix cache."""
        (output,) = self.llm.generate(
            [{"prompt_token_ids": list(prompt)}], greedy(max_tokens, **params), use_tqdm=False
        )
        return list(output.outputs[0].token_ids), int(output.num_cached_tokens)

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
        """Both sides are consistent and every block is back."""
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


def setting(
    method: str | None = None,
    budget: int | float | None = None,
    *,
    keep: Sequence[int] | None = None,
    decode: bool | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Arguments of a request with settings of its own, for :meth:`Engine.generate` and others.

    Args:
        method: None for the engine's.
        budget: None for the engine's.
        keep: Starts and ends of prompt tokens that must stay.
        decode: False: generated tokens are left alone.
        params: Of the method.

    """
    given = {
        "kv_compression": method,
        "kv_compression_budget": budget,
        "kv_compression_config": params or None,
        "kv_compression_keep": keep,
        "kv_compression_decode": decode,
    }
    return {"extra_args": {name: value for name, value in given.items() if value is not None}}

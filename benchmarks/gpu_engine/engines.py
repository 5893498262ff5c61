"""Engines of the GPU suite: opened in this process, asked for greedy answers, closed again."""

import contextlib
import gc
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_engine import rehearsal
from benchmarks.gpu_engine.random_model import (
    LOAD_FORMAT,
    SMALL,
    TINY,
    ModelShape,
    register_loader,
    write_config,
)

EAGER: dict[str, Any] = {"enforce_eager": True}
GRAPHS: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
"""CUDA graphs of whole decode steps, without torch.compile: quick to start."""


@dataclass(frozen=True)
class World:
    """Where checks run.

    Attributes:
        shape: The model.
        count: Prompts that run together.
        prompt: Tokens of a prompt that is longer than the budget.
        step: Tokens of one prefill step; shorter than the prompt, so that it comes in chunks.
        answer: Tokens to generate.
        budget: Tokens that a layer keeps.
        on_cpu: Rehearse: Triton's interpreter and a stand-in for the device.

    """

    shape: ModelShape
    count: int
    prompt: int
    step: int
    answer: int
    budget: int
    on_cpu: bool = False


GPU_WORLD = World(SMALL, count=4, prompt=600, step=256, answer=64, budget=256)
CPU_WORLD = World(TINY, count=2, prompt=90, step=64, answer=20, budget=48, on_cpu=True)


@dataclass(frozen=True)
class Answer:
    """A greedy completion: its tokens, and the logarithm of each one's probability."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class OpenEngine:
    """A running engine; plain vLLM has no session and counts nothing."""

    llm: Any
    compressed: bool

    @property
    def worker(self) -> Any:
        """vLLM's worker."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    @property
    def counts(self) -> Mapping[str, int]:
        """Of the worker's session (prompt_cuts, decode_cuts, ...) and of prefills by their way."""
        if not self.compressed:
            return {}
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        ways = managers[scheduler._group].counters.prefills
        return {**self.worker._session.stats, **{f"{way} prefills": n for way, n in ways.items()}}

    @property
    def attention(self) -> str:
        """Name of the attention implementation that the layers use."""
        layers = self.worker.model_runner.compilation_config.static_forward_context
        return type(next(iter(layers.values())).impl).__name__

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """Complete prompts that run together."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            _greedy(tokens, logprobs=0),
            use_tqdm=False,
        )
        return [
            Answer(
                list(done.token_ids),
                [
                    step[token].logprob
                    for step, token in zip(done.logprobs, done.token_ids, strict=True)
                ],
            )
            for done in (output.outputs[0] for output in outputs)
        ]

    def time_steps(self, prompts: Sequence[Sequence[int]], steps: int) -> list[float]:
        """Return when decode steps ended in which all prompts took part: ``steps`` + 1 times.

        Args:
            prompts: Run together, in chunks where they do not fit into one step.
            steps: Decode steps to time.

        """
        engine = self.llm.llm_engine
        chunk = engine.vllm_config.scheduler_config.max_num_batched_tokens
        # The first prompts already answer while the last ones are read.
        prefill = math.ceil(sum(map(len, prompts)) / chunk) + 2
        for number, prompt in enumerate(prompts):
            prompt_tokens = {"prompt_token_ids": list(prompt)}
            engine.add_request(f"timed-{number}", prompt_tokens, _greedy(steps + prefill + 2))
        begun: set[str] = set()
        ended = []
        finished = False
        while engine.has_unfinished_requests():
            outputs = engine.step()
            begun.update(output.request_id for output in outputs)
            finished = finished or any(output.finished for output in outputs)
            if outputs and len(begun) == len(prompts) and not finished:
                ended.append(time.perf_counter())
        # In the first of them another prompt's prefill may still have been in flight.
        return ended[1 : steps + 2]


def _greedy(tokens: int, logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
    )


def prompts(world: World) -> list[list[int]]:
    """Random tokens, the same at every call; lengths differ a little, so that chunks do too."""
    draw = random.Random(0)
    return [
        [draw.randrange(2, world.shape.vocabulary) for _ in range(world.prompt - 7 * number)]
        for number in range(world.count)
    ]


@contextlib.contextmanager
def opened(
    world: World,
    backend: str | None,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[OpenEngine]:
    """Open an engine for a while.

    Args:
        world: Model and sizes.
        backend: Of attention; None for vLLM's choice.
        method: None for plain vLLM.
        config: Parameters of the method and options.
        settings: vLLM's engine arguments beside those that all checks share.

    """
    wanted: dict[str, Any] = {
        "load_format": LOAD_FORMAT,
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "block_size": 16,
        "max_model_len": world.prompt + world.answer + 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": world.step,
        "enable_prefix_caching": False,
        # Given, so that engines that start side by side do not measure each other's memory.
        "kv_cache_memory_bytes": 2 << 30,
        "num_gpu_blocks_override": 4 * math.ceil((world.prompt + world.answer) / 16) + 64,
        "gpu_memory_utilization": 0.05,
        "seed": 0,
    }
    if backend is not None:
        wanted["attention_backend"] = backend
    wanted |= settings
    if method is not None:
        wanted["kv_compression"] = method
        if method not in ("none", "scatter"):
            wanted["kv_compression_budget"] = world.budget
        wanted["kv_compression_config"] = {"check_integrity": True, **(config or {})}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wanted["model"] = str(write_config(folder, world.shape))
        if world.on_cpu:
            wanted |= stack.enter_context(rehearsal.gpu_worker(backend, wanted))
        register_loader()
        from vllm_kvcompress import LLM

        llm = LLM(**wanted)
        try:
            yield OpenEngine(llm, method is not None)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

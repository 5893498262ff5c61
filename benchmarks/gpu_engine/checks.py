"""What a GPU's engine must do: each check runs real engines and raises where it does not.

A check takes the world and a backend and yields rows; its verdict is written by ``check.py``.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu_engine.engines import EAGER, GRAPHS, Answer, World, opened, prompts
from benchmarks.gpu_engine.results import Row

Check = Callable[[World, str], Iterator[Row]]

MEASURED = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None}
"""The engine finds out itself how large its pool can be."""


class WrongAnswerError(AssertionError):
    """An engine answered otherwise than it must."""


def serve(world: World, backend: str) -> Iterator[Row]:
    """CAKE starts, cuts its prompts and answers."""
    _served(world, backend, "cake", {}, GRAPHS)
    yield from ()


def scatter_eager(world: World, backend: str) -> Iterator[Row]:
    """All tokens kept, on other layers' pages: plain vLLM's answers, without graphs."""
    yield from _scatter_equals_plain(world, backend, EAGER)


def scatter_graphs(world: World, backend: str) -> Iterator[Row]:
    """The same where decode steps replay FULL CUDA graphs."""
    yield from _scatter_equals_plain(world, backend, GRAPHS)


def scatter_defaults(world: World, backend: str) -> Iterator[Row]:
    """The same with vLLM's defaults: torch.compile, piecewise and full graphs, async scheduling."""
    yield from _scatter_equals_plain(world, backend, {})


def scatter_fp8(world: World, backend: str) -> Iterator[Row]:
    """The same with 8-bit keys and values, queries quantized where the backend does that."""
    yield from _scatter_equals_plain(world, backend, {**GRAPHS, "kv_cache_dtype": "fp8"})


def graphs_change_nothing(world: World, backend: str) -> Iterator[Row]:
    """CAKE with a decode budget answers alike with graphs and without."""
    config = {"decode_budget": world.budget, "decode_buffer": 16}
    eager = _served(world, backend, "cake", config, EAGER)
    yield from _compared(eager, _served(world, backend, "cake", config, GRAPHS), backend)


def async_changes_nothing(world: World, backend: str) -> Iterator[Row]:
    """CAKE with a decode budget answers alike with asynchronous scheduling and without."""
    config = {"decode_budget": world.budget, "decode_buffer": 16}
    answers = [
        _served(world, backend, "cake", config, {**GRAPHS, "async_scheduling": on})
        for on in (True, False)
    ]
    yield from _compared(answers[0], answers[1], backend)


def methods(world: World, backend: str) -> Iterator[Row]:
    """Methods serve, prompts in chunks, and vLLM's JIT monitor finds nothing compiled late.

    Where plain vLLM compiles late too, its own row says so and the methods are not blamed.
    """
    strict = {**GRAPHS, "jit_monitor_mode": "error"}
    with opened(world, backend, **strict) as engine:
        engine.ask(prompts(world), world.answer)
    yield Row("plain under jit_monitor_mode=error", backend, "ok")
    for method in ("cake", "dynamickv", "snapkv", "h2o", "keydiff"):
        _served(world, backend, method, {}, strict)
        yield Row(f"{method} under jit_monitor_mode=error", backend, "ok")


def cascade(world: World, backend: str) -> Iterator[Row]:
    """A prompt that is cut layer by layer while its one step runs."""
    length = world.prompt + 16
    _served(world, backend, "cake", {"prefill": "cascade"}, {"max_num_batched_tokens": length})
    yield from ()


def fp8_decode_budget(world: World, backend: str) -> Iterator[Row]:
    """Queries are kept for decode cuts though the cache, and so the queries, have eight bits."""
    config = {"decode_budget": world.budget, "decode_buffer": 16}
    _served(world, backend, "cake", config, {**GRAPHS, "kv_cache_dtype": "fp8"})
    yield from ()


def sync_check(world: World, backend: str) -> Iterator[Row]:
    """vLLM finds no step that waits for the device where it must not; first plain vLLM's own."""
    assert os.environ.get("VLLM_GPU_SYNC_CHECK") == "error", "check.py sets it before vLLM reads it"
    with opened(world, backend, **GRAPHS) as engine:
        engine.ask(prompts(world), world.answer)
    yield Row("plain under VLLM_GPU_SYNC_CHECK=error", backend, "ok")
    _served(world, backend, "cake", {}, GRAPHS)


def default_start(world: World, _: str) -> Iterator[Row]:
    """What a user gets who sets nothing but a method: backend, memory, first answer."""
    for method in (None, "cake"):
        with opened(world, None, method, **MEASURED) as engine:
            engine.ask(prompts(world), world.answer)
            blocks = engine.worker.cache_config.num_gpu_blocks
            case = f"{method or 'plain'}, {engine.attention}"
            yield Row("blocks of the pool by default", case, str(blocks), "blocks")


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        serve,
        scatter_graphs,
        scatter_defaults,
        methods,
        scatter_eager,
        scatter_fp8,
        fp8_decode_budget,
        graphs_change_nothing,
        async_changes_nothing,
        cascade,
        sync_check,
    )
}
"""Most telling ones first: where time runs out, the last ones are left out."""


def _scatter_equals_plain(world: World, backend: str, settings: dict[str, Any]) -> Iterator[Row]:
    with opened(world, backend, **settings) as engine:
        plain = engine.ask(prompts(world), world.answer)
    yield from _compared(plain, _served(world, backend, "scatter", {}, settings), backend)


def _served(
    world: World, backend: str, method: str, config: dict[str, Any], settings: dict[str, Any]
) -> list[Answer]:
    """Answers of a compressed engine, which must have made the cuts that its settings ask for."""
    with opened(world, backend, method, config, **settings) as engine:
        asked = prompts(world)
        answers = engine.ask(asked, world.answer)
        counts, attention = engine.counts, engine.attention
    if not attention.startswith("Arena"):
        raise WrongAnswerError(f"attention is {attention}, not ours")
    if counts["prompt_cuts"] < len(asked):
        raise WrongAnswerError(f"{len(asked)} prompts, but {counts['prompt_cuts']} cuts")
    if "decode_budget" in config and not counts["decode_cuts"]:
        raise WrongAnswerError("no cut while generating")
    if config.get("prefill") == "cascade" and not counts["cascade prefills"]:
        raise WrongAnswerError("no prompt was cut while its step ran")
    return answers


def _compared(wanted: list[Answer], found: list[Answer], backend: str) -> Iterator[Row]:
    """Yield how far logprobs are apart; raise where tokens differ."""
    apart = 0.0
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        for step, pair in enumerate(zip(one.tokens, other.tokens, strict=True)):
            gap = abs(one.logprobs[step] - other.logprobs[step])
            if pair[0] != pair[1]:
                raise WrongAnswerError(
                    f"answer {number} differs at token {step}: {pair[0]} and {pair[1]}, whose "
                    f"logprobs are {gap:.2g} apart; before it at most {apart:.2g}"
                )
            apart = max(apart, gap)
    yield Row("largest difference of logprobs", backend, f"{apart:.3g}", "nats")

"""What engines on a GPU must do: each check runs real ones and raises where they do not.

A check takes the world and a backend and yields rows; ``check.py`` writes them and the verdict.
vLLM's JIT monitor and its check for waiting steps are switched on once a process and stay on while
another engine would start, so whatever looks at them opens one engine alone.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu_engine.engines import EAGER, GRAPHS, Answer, World, opened, prompts
from benchmarks.gpu_engine.results import Row

Check = Callable[[World, str], Iterator[Row]]

NEAR_TIE = 0.2
"""Nats: tokens this close may change places where two runs add up in another order, in bf16."""

MEASURED: dict[str, Any] = {
    "kv_cache_memory_bytes": None,
    "num_gpu_blocks_override": None,
    "gpu_memory_utilization": 0.9,
}
"""The engine finds out itself how large its pool can be."""


class WrongAnswerError(AssertionError):
    """An engine answered otherwise than it must."""


def serve(world: World, backend: str) -> Iterator[Row]:
    """CAKE starts, cuts its prompts and answers."""
    yield from _served_row(replace(world, answer=8), backend, "cake", {}, GRAPHS)


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


def decode_budget_fp8(world: World, backend: str) -> Iterator[Row]:
    """Queries are kept for decode cuts though the cache, and so the queries, have eight bits."""
    settings = {**GRAPHS, "kv_cache_dtype": "fp8"}
    yield from _served_row(world, backend, "cake", _while_generating(world), settings)


def decode_budget_graphs(world: World, backend: str) -> Iterator[Row]:
    """Cuts while generating, with graphs and without: the same answers but for near ties."""
    config = _while_generating(world)
    eager = _served(world, backend, "cake", config, EAGER)
    found = _served(world, backend, "cake", config, GRAPHS)
    yield from _compared(eager, found, backend, NEAR_TIE)


def decode_budget_async(world: World, backend: str) -> Iterator[Row]:
    """Cuts while generating, asynchronous scheduling on and off: the same but for near ties."""
    answers = [
        _served(
            world, backend, "cake", _while_generating(world), {**GRAPHS, "async_scheduling": on}
        )
        for on in (True, False)
    ]
    yield from _compared(answers[0], answers[1], backend, NEAR_TIE)


def cascade(world: World, backend: str) -> Iterator[Row]:
    """Prompts that are cut layer by layer while their step runs."""
    settings = {**GRAPHS, "max_num_batched_tokens": world.prompt + 16}
    yield from _served_row(world, backend, "cake", {"prefill": "cascade"}, settings)


def alone(
    method: str | None, settings: dict[str, Any], world: World, backend: str
) -> Iterator[Row]:
    """One engine, plain vLLM's for None, serves with these settings."""
    if method is None:
        with opened(world, backend, **settings) as engine:
            engine.ask(prompts(world), world.answer)
            yield Row("attention", backend, engine.attention)
    else:
        yield from _served_row(world, backend, method, {}, settings)


def default_start(method: str | None, world: World, _: str) -> Iterator[Row]:
    """What a user gets who sets nothing but a method: backend, and the size of the pool."""
    with opened(world, None, method, **MEASURED) as engine:
        engine.ask(prompts(world), world.answer)
        blocks = engine.worker.cache_config.num_gpu_blocks
        yield Row(
            "pool by default", f"{method or 'plain'}, {engine.attention}", f"{blocks}", "blocks"
        )


_JIT = {**GRAPHS, "jit_monitor_mode": "error"}

CHECKS: dict[str, Check] = {
    **{check.__name__: check for check in (serve, scatter_graphs, scatter_defaults, scatter_fp8)},
    "jit_cake": functools.partial(alone, "cake", _JIT),
    "jit_plain": functools.partial(alone, None, _JIT),
    "sync_cake": functools.partial(alone, "cake", GRAPHS),
    "sync_plain": functools.partial(alone, None, GRAPHS),
    **{
        check.__name__: check
        for check in (
            decode_budget_fp8,
            decode_budget_graphs,
            decode_budget_async,
            cascade,
            scatter_eager,
        )
    },
    **{
        f"jit_{method}": functools.partial(alone, method, _JIT)
        for method in ("dynamickv", "snapkv", "h2o", "keydiff")
    },
}
"""Most telling ones first: where time runs out, the last ones are left out."""

DEFAULT_STARTS: dict[str, Check] = {
    "default_plain": functools.partial(default_start, None),
    "default_cake": functools.partial(default_start, "cake"),
}
"""Run one at a time: they look at how much memory is left."""


def _while_generating(world: World) -> dict[str, Any]:
    return {"decode_budget": world.budget, "decode_buffer": 16, "window": 16}


def _scatter_equals_plain(world: World, backend: str, settings: dict[str, Any]) -> Iterator[Row]:
    with opened(world, backend, **settings) as engine:
        plain = engine.ask(prompts(world), world.answer)
        yield Row("plain vLLM answers", f"{backend}, {settings}", "ok")
    yield from _compared(plain, _served(world, backend, "scatter", {}, settings), backend, 0.0)


def _served_row(
    world: World, backend: str, method: str, config: dict[str, Any], settings: dict[str, Any]
) -> Iterator[Row]:
    answers = _served(world, backend, method, config, settings)
    yield Row("answers", f"{method}, {backend}", str(len(answers)), "requests")


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


def _compared(
    wanted: list[Answer], found: list[Answer], backend: str, near_tie: float
) -> Iterator[Row]:
    """Yield how far logprobs are apart; raise where tokens differ and are no near tie.

    After a near tie the two answers go on from different texts and are not compared.
    """
    apart, ties = 0.0, 0
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        for step, pair in enumerate(zip(one.tokens, other.tokens, strict=True)):
            gap = abs(one.logprobs[step] - other.logprobs[step])
            if pair[0] != pair[1]:
                if gap < near_tie:
                    ties += 1
                    break
                raise WrongAnswerError(
                    f"answer {number} differs at token {step}: {pair[0]} and {pair[1]}, whose "
                    f"logprobs are {gap:.2g} apart; before it at most {apart:.2g}"
                )
            apart = max(apart, gap)
    yield Row("largest difference of logprobs", backend, f"{apart:.3g}", "nats")
    yield Row("answers that part at a near tie", backend, str(ties), "requests")

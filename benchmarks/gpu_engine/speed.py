"""Decode steps and first tokens, compressed against plain, the two engines in one process.

They take turns round by round; a row's figure is the median over rounds, a ratio's the median of
the rounds' ratios. Each case has a column of plain vLLM at prompts of the budget's length: no
eviction can be faster than that.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.gpu_engine.engines import GRAPHS, OpenEngine, World, opened, prompts
from benchmarks.gpu_engine.random_model import LLAMA_8B, TINY, ModelShape
from benchmarks.gpu_engine.results import Row

METHOD = "cake"


@dataclass(frozen=True)
class Load:
    """Prompts that run together."""

    count: int
    length: int


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        shape: The model.
        budget: Tokens that a layer keeps.
        loads: Decode steps are timed with each of them.
        steps: How many decode steps a round takes.
        rounds: After one that warms up.

    """

    shape: ModelShape
    budget: int
    loads: tuple[Load, ...]
    steps: int
    rounds: int


GPU_PLAN = Plan(LLAMA_8B, 1024, (Load(32, 8000), Load(4, 32000), Load(1, 8000)), 64, 3)
CPU_PLAN = Plan(TINY, 48, (Load(2, 90),), 4, 1)


def speed(plan: Plan, backend: str, *, on_cpu: bool) -> Iterator[Row]:
    """Yield times and ratios; see the module's docstring."""
    world = World(plan.shape, 0, 0, 0, 0, plan.budget, on_cpu)
    longest = max(load.length for load in plan.loads)
    blocks = max(load.count * (load.length + plan.steps) for load in plan.loads) // 16
    settings = {
        **GRAPHS,
        "max_model_len": longest + plan.steps + 16,
        "max_num_seqs": max(load.count for load in plan.loads),
        "max_num_batched_tokens": max(longest // 4, 64),
        # What cuts need beside the prompts, in blocks of 16.
        "num_gpu_blocks_override": blocks + max(load.count for load in plan.loads) * 80 + 64,
        # Checking costs time.
        "config": {"check_integrity": False},
    }
    with (
        opened(world, backend, None, **settings) as plain,
        opened(world, backend, METHOD, **settings) as compressed,
    ):
        for load in plan.loads:
            bound = Load(load.count, plan.budget)
            first, steps = _paired(world, plan, [(plain, load), (compressed, load), (plain, bound)])
            case = f"{backend}, {load.count} x {load.length}, budget {plan.budget}"
            names = ("plain", METHOD, "plain at budget length")
            for name, times in zip(names, first, strict=True):
                yield Row(f"first tokens, {name}", case, _ms(times), "ms")
            for name, times in zip(names, steps, strict=True):
                yield Row(f"decode step, {name}", case, _ms(times), "ms")
            yield Row("first tokens, plain / compressed", case, _ratio(first[0], first[1]), "x")
            yield Row("decode step, plain / compressed", case, _ratio(steps[0], steps[1]), "x")
            yield Row("decode step, compressed / bound", case, _ratio(steps[1], steps[2]), "x")
            yield Row("decode step, by bytes alone", case, f"{_by_bytes(plan, load):.3f}", "x")
        cuts = compressed.counts["prompt_cuts"]
    if not cuts:
        raise AssertionError("nothing was compressed")


def _paired(
    world: World, plan: Plan, turns: list[tuple[OpenEngine, Load]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds to the first tokens and per decode step: a list per turn, an entry per round."""
    first: list[list[float]] = [[] for _ in turns]
    steps: list[list[float]] = [[] for _ in turns]
    for round_ in range(plan.rounds + 1):
        for turn, (engine, load) in enumerate(turns):
            to_first, per_step = _run(
                engine, prompts(replace(world, count=load.count, prompt=load.length)), plan.steps
            )
            if round_:
                first[turn].append(to_first)
                steps[turn].append(per_step)
    return first, steps


def _run(engine: OpenEngine, asked: list[list[int]], steps: int) -> tuple[float, float]:
    """Seconds until all prompts have their first token, and per decode step after that."""
    begun = time.perf_counter()
    engine.ask(asked, 1)
    to_first = time.perf_counter() - begun
    ended = engine.time_steps(asked, steps)
    return to_first, (ended[-1] - ended[0]) / (len(ended) - 1)


def _ms(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.3f}"


def _ratio(one: list[float], other: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.3f}"


def _by_bytes(plan: Plan, load: Load) -> float:
    """Bytes of weights and KV cache that a plain step reads, divided by a compressed step's."""
    shape = plan.shape
    attention = shape.hidden * shape.head_size * 2 * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    weights = shape.layers * layer + shape.hidden * shape.vocabulary
    token = shape.layers * 2 * shape.kv_heads * shape.head_size
    return (weights + token * load.count * load.length) / (
        weights + token * load.count * plan.budget
    )

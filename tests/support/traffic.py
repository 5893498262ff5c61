"""Random requests for vLLM's real schedulers, drawn by whoever knows how to choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from tests.support.scheduling import AnyScheduler, Engine, configure, smallest_pool
from vllm_kvcompress.engine.scheduler.arena_scheduler import ArenaAsyncScheduler, ArenaScheduler
from vllm_kvcompress.planning.config import PREFILLS

LAYERS = 8
MAX_LEN = 300
STEP = 64
"""Tokens of one step; longer prompts are chunked."""
PATIENCE = 60
"""Steps in which at least one token must come out while there are requests."""

Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Setup:
    """An engine.

    Attributes:
        cls: Its scheduler.
        options: Of :func:`configure`, in pairs.
        spare: Blocks beyond those that vLLM's start-up check asks for.

    """

    cls: AnyScheduler
    options: tuple[tuple[str, Any], ...]
    spare: int


@dataclass(frozen=True)
class Ask:
    """One request of the traffic.

    Attributes:
        prompt: Tokens.
        document: Number of the text it begins with; 0: one of its own.
        shared: Tokens of that text.
        tokens: To be generated; cut to what the pool can hold.
        priority: Where the policy cares.
        decode: Whether generated tokens may be evicted.
        gap: Steps since the request before.
        abort: Steps after which its client leaves; 0: never.

    """

    prompt: int
    document: int
    shared: int
    tokens: int
    priority: int
    decode: bool
    gap: int
    abort: int

    def ids(self, index: int) -> list[int]:
        shared = min(self.shared, self.prompt) if self.document else 0
        own = range(self.prompt - shared)
        return [
            *(self.document * 1000 + i for i in range(shared)),
            *(10**6 + index + i for i in own),
        ]


def choose_setup(
    choose: Choose, number: int | None = None, prefills: Sequence[str] = PREFILLS
) -> Setup:
    """Draw an engine; methods and budgets only where the settings allow them.

    Args:
        choose: Returns one of several.
        number: If given, successive numbers get all prefills and schedulers in turn.
        prefills: Those to choose from.

    """
    kinds = [(mode, cls) for mode in prefills for cls in (ArenaScheduler, ArenaAsyncScheduler)]
    mode, cls = choose(kinds) if number is None else kinds[number % len(kinds)]
    evicts = ("uniform", "cake", "dynamickv")
    options: dict[str, Any] = {
        "prefill": mode,
        "method": choose(evicts if mode in ("cascade", "streaming") else (*evicts, "scatter")),
        "budget": choose((16, 24, 40) if mode == "streaming" else (16, 24, 40, 0.25, 0.5)),
        "enable_prefix_caching": choose((True, True, False)),
        "scheduling_policy": choose(("fcfs", "priority")),
        "max_num_seqs": choose((3, 6)),
        # With a step that takes any prompt, a pool may be too small for any long prompt as a whole.
        "max_num_batched_tokens": choose((STEP, STEP, MAX_LEN)),
        "max_len": MAX_LEN,
        "watermark": choose((0.0, 0.0, 0.1)),
        "long_prefill_token_threshold": choose((0, 0, 0, 40)),
        "scheduler_reserve_full_isl": choose((True, True, False)),
        "reserve_tokens": choose((0, 0, 16, 256)),
    }
    if mode == "streaming":
        options["stream_chunk"] = choose((None, 16, 40))
        options["stream_budget"] = choose((None, options["budget"], 56))
    if options["method"] != "scatter" and choose((True, False)):
        options["decode_budget"] = choose((16, 24, 48))
        options["decode_buffer"] = choose((8, 12, 32))
    return Setup(cls, tuple(options.items()), choose((0, 1, 2, 3, 5, 8, 13, 21)))


def choose_ask(choose: Choose) -> Ask:
    """Draw a request."""
    least, most = choose(((1, 40), (30, STEP), (STEP - 8, STEP + 8), (STEP, MAX_LEN - 1)))
    return Ask(
        prompt=choose(range(least, most + 1)),
        document=choose((0, 0, 1, 2, 3)),
        shared=choose((8, 16, 30, 48, 64, 120, 200)),
        tokens=choose((1, 2, 5, 20, 60, 200, MAX_LEN)),
        priority=choose(range(3)),
        decode=choose((True, True, False)),
        gap=choose((0, 0, 0, 1, 3, 10)),
        abort=choose((*(0,) * 9, 1, 4, 20)),
    )


class Traffic:
    """Requests on their way through one engine."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        options = dict(setup.options)
        config, blocks = _smallest(folder, replace(setup, spare=0))
        self.engine = Engine(setup.cls, config, blocks + setup.spare)
        self.most = options["max_len"]
        self.asked: dict[str, int] = {}
        self.leaving: list[tuple[int, str]] = []
        self.aborted = self.now = self.silent = 0

    def add(self, ask: Ask) -> None:
        for _ in range(ask.gap):
            self.step()
        engine = self.engine
        index = len(engine.answers)
        name = f"r{index}"
        # What the frontend will see to: no request that the pool could never hold.
        most = engine.planner.most_tokens(ask.prompt, self.most, engine.room, ask.decode)
        assert most > ask.prompt, "start-up let a pool pass that is too small"
        self.asked[name] = min(ask.tokens, most - ask.prompt)
        decode = None if ask.decode else False
        engine.add(name, ask.ids(index), self.asked[name], decode=decode, priority=ask.priority)
        if ask.abort:
            self.leaving.append((self.now + ask.abort, name))

    def step(self) -> None:
        self.now += 1
        for when, name in [entry for entry in self.leaving if entry[0] <= self.now]:
            self.leaving.remove((when, name))
            if name in self.engine.scheduler.requests:
                self.engine.abort(name)
                del self.asked[name]
                self.aborted += 1
        if not self.engine.scheduler.requests and not self.engine.in_flight:
            return
        before = sum(self.engine.answers.values())
        self.engine.step()
        waits = sum(self.engine.answers.values()) == before
        self.silent = self.silent + 1 if waits else 0
        assert self.silent < PATIENCE, f"no token for {PATIENCE} steps"

    def finish(self) -> Counter[str]:
        """Let everybody end; return what happened on the way."""
        engine = self.engine
        while engine.scheduler.requests or engine.in_flight:
            self.step()
        assert {name: engine.answers[name] for name in self.asked} == self.asked
        assert engine.free == engine.total, "blocks were lost"
        assert not engine.arena.private_blocks()
        assert engine.arena.block_gauges().reserved == 0
        prefills = engine.arena.counters.prefills
        seen = Counter[str]({f"prefills_{path}": count for path, count in prefills.items()})
        seen.update(
            preemptions=engine.preemptions,
            hits=engine.hits,
            aborts=self.aborted,
            finished=len(self.asked),
        )
        return seen


@cache
def _smallest(folder: Path, setup: Setup) -> tuple[VllmConfig, int]:
    """A configuration and its smallest pool, both of which take their time to find."""
    config = configure(folder, **dict(setup.options))
    return config, smallest_pool(config, setup.cls)

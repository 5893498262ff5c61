"""Methods of other packages that fail, each in one way, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.methods import (
    WINDOW_NEEDS,
    Allocator,
    LayerInput,
    LayerScores,
    MethodSpec,
    Scorer,
    window_votes,
)

WINDOW = 8
Maker = Callable[..., Any]


class OopsError(Exception):
    """What only the method knows."""


def oops(*_: Any) -> Any:
    raise OopsError("no such thing")


def good(layer: LayerInput) -> Tensor:
    return window_votes(layer, kernel=3)


def one_of(tokens: Tensor, number: float) -> Tensor:
    tokens = tokens.clone()
    tokens[1, 17] = number
    return tokens


SCORES: dict[str, tuple[Maker, str]] = {
    "raise": (oops, "scoring layer 3 has raised OopsError: no such thing"),
    "exhausted": (
        lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")),
        "scoring layer 3 has raised OutOfMemoryError: out of memory",
    ),
    "nothing": (lambda _: None, "the scorer has returned NoneType for layer 3, not a tensor"),
    "whole": (
        lambda layer: torch.arange(layer.num_tokens).float().repeat(layer.num_kv_heads, 1),
        r"torch.float32 \[2, 92\] for layer 3 \(KV heads, .*\), got torch.float32 \[2, 100\]",
    ),
    "short": (lambda layer: good(layer)[:, 3:], r"\[2, 92\] .*, got torch.float32 \[2, 89\]"),
    "heads": (lambda layer: good(layer)[:1], r"\[2, 92\] .*, got torch.float32 \[1, 92\]"),
    "flat": (lambda layer: good(layer)[0], r"\[2, 92\] .*, got torch.float32 \[92\]"),
    "integers": (lambda layer: good(layer).long(), r"\[2, 92\] .*, got torch.int64 \[2, 92\]"),
    "device": (lambda layer: good(layer).to("meta"), "has returned scores on meta for layer 3"),
    "nan": (lambda layer: one_of(good(layer), math.nan), "1 of 184 scores of layer 3 are not fin"),
    "infinite": (lambda layer: one_of(good(layer), math.inf), "1 of 184 scores of layer 3 are not"),
}
STATS: dict[str, tuple[Maker, str]] = {
    "stats raise": (oops, "scoring layer 3 has raised OopsError: no such thing"),
    "stats list": (lambda _: [1.0], "stats of layer 3 must be a mapping, got list"),
    "stats text": (lambda _: {"x": "1"}, r'the stat "x" of layer 3 must be a number .*, got str'),
    "stats nan": (lambda _: {"x": math.nan}, 'the stat "x" of layer 3 is NaN'),
    "stats nan tensor": (lambda _: {"x": torch.tensor(math.nan)}, 'the stat "x" of layer 3 is NaN'),
}
WEIGHTS: dict[str, tuple[Maker, str]] = {
    "weights raise": (oops, "weighing the layers has raised OopsError: no such thing"),
    "weights nan": (
        lambda n: np.full(n, math.nan),
        "must be finite and not negative, got nan",
    ),
    "weights inf": (lambda n: [math.inf] * n, "weights must be finite and not negative, got inf"),
    "weights negative": (lambda n: [-1.0] * n, "weights must be finite and not negative, got -1.0"),
    "weights few": (lambda n: np.ones(n - 1), r"weights must have shape \(5,\), got \(4,\)"),
    "weights words": (lambda n: ["a"] * n, "weighing the layers has raised ValueError: could not"),
    "weights nothing": (lambda n: None, r"weights must have shape \(5,\), got \(\)"),
}
CHOICES: dict[str, tuple[Maker, str]] = {
    "select raise": (oops, "selecting tokens has raised OopsError: no such thing"),
    "select few": (
        lambda ids: ids[:, 1:],
        r"return integers \[2, \d+\] .*, got torch.int64 \[2,",
    ),
    "select floats": (
        lambda ids: ids.float(),
        r"return integers \[2, \d+\] .*, got torch.float32 \[",
    ),
    "select nothing": (lambda _: None, "select has returned NoneType, not a tensor"),
    "select elsewhere": (lambda ids: ids.to("meta"), r"on cpu, got torch.int64 \[2, \d+\] on meta"),
    "select twice": (
        lambda ids: torch.cat([ids[:, 1:2], ids[:, 1:]], dim=1),
        "must return ascending tokens below 92, each once",
    ),
    "select beyond": (lambda ids: ids + 92, "must return ascending tokens below 92, each once"),
    "select below": (lambda ids: ids - 92, "must return ascending tokens below 92, each once"),
}
LIMITS: dict[str, tuple[Maker, str]] = {
    "cap raise": (oops, "its cap has raised OopsError: no such thing"),
    "cap float": (lambda: 1.5, "its cap must be an integer of at least 0, got 1.5"),
    "floor negative": (lambda: -1, "its floor must be an integer of at least 0, got -1"),
}
FAULTS = {**SCORES, **STATS, **WEIGHTS, **CHOICES, **LIMITS}


def faulty(kind: str, at: int = 3) -> MethodSpec:
    """A method of another package that does as asked but for one fault.

    Args:
        kind: Of :data:`FAULTS`.
        at: Layer whose scores or stats are wrong.

    """
    make = FAULTS[kind][0]

    @dataclass(frozen=True, kw_only=True)
    class FaultyScorer(Scorer):
        needs = WINDOW_NEEDS
        uses_window_statistics: ClassVar[bool] = True

        def score(self, layer: LayerInput) -> Tensor:
            fails = kind in SCORES and layer.layer == at
            found: Tensor = make(layer) if fails else good(layer)
            return found

    @dataclass(frozen=True, kw_only=True)
    class ChoosingScorer(FaultyScorer):
        def select(self, tokens: Tensor, count: int) -> Tensor:
            found: Tensor = make(super().select(tokens, count))
            return found

        budgets_are_nested: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class FaultyAllocator(Allocator):
        needs = WINDOW_NEEDS

        @property
        def layers_per_division(self) -> int:
            return 2

        def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
            fails = kind in STATS and layer.layer == at
            return make(layer) if fails else {"x": 1.0}

        def weights(self, seen: Sequence[LayerScores], *, base: int, num_layers: int) -> Any:
            if kind in WEIGHTS and len(seen) == num_layers:
                return make(len(seen))
            return np.arange(1.0, 1.0 + len(seen))

        def cap(self, history: int, base: int) -> int:
            return make() if kind.startswith("cap") else history

        def floor(self, history: int, base: int) -> int:
            return make() if kind.startswith("floor") else 0

    scorer = ChoosingScorer if kind in CHOICES else FaultyScorer
    return MethodSpec(name="faulty", scorer=scorer, allocator=FaultyAllocator, window=WINDOW, api=1)

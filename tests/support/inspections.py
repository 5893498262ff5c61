"""Runs and inspections for the tests of ``kvcompress inspect``."""

import math
from typing import Any

import numpy as np

from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Run

WORDS = ["The", " captain", " saw", " a", " ship", ",", "\n", " & then", " <b>", "</script>"]


def made(
    tokens: int,
    layers: int,
    *,
    heads: int = 2,
    budget: int = 96,
    method: str = "cake",
    seed: int = 0,
) -> Run:
    """A run that keeps random tokens, with the numbers of CAKE if it is that."""
    random = np.random.default_rng(seed)
    window = 32
    kept = []
    for layer in range(layers):
        history = budget - window + (16 if layer % 2 else -16)
        rows = [random.choice(tokens - window, history, replace=False) for _ in range(heads)]
        last = np.arange(tokens - window, tokens)
        kept.append(np.stack([np.concatenate([np.sort(row), last]) for row in rows]))
    stats = [
        {"log_entropy": math.log(1 + layer), "log_shift": -float(layer)} for layer in range(layers)
    ]
    weights = random.random(layers)
    cake = method == "cake"
    return Run(
        request_id="a",
        number=1,
        method=method,
        prompt_len=tokens,
        window=window,
        block_size=16,
        kept=tuple(kept),
        stats=tuple(stats) if cake else (),
        weights=weights / weights.sum() if cake else None,
    )


def inspection(tokens: int = 500, layers: int = 3, methods: int = 1, **changes: Any) -> Inspection:
    names = ["cake", "dynamickv", "keydiff+cake"][:methods]
    return Inspection(
        model=changes.pop("model", "qwen2.5-coder-0.5b-instruct"),
        budget=changes.pop("budget", 96),
        token_ids=np.arange(tokens),
        pieces=tuple(WORDS[i % len(WORDS)] for i in range(tokens)),
        runs=tuple(made(tokens, layers, method=name, seed=i) for i, name in enumerate(names)),
        question=changes.pop("question", "Is x < y & z? $1 and <i>that</i>"),
    )

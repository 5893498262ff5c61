"""The runs of ``kvcompress eval`` that docs/results.md stands on.

Methods and parameters were tuned on seeds 0 to 49; everything here is asked with seeds from 100.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

QWEN = "models/qwen2.5-coder-0.5b-instruct"
SMOL = "models/smollm2-135m-instruct"

SEED = 100
BUDGETS = ("0.069", "0.125", "0.25", "0.5")
SMALL = ("0.069", "0.125")

ESSAYS = tuple(
    f"ruler/{name}"
    for name in (
        *("niah_single_1", "niah_single_2", "niah_single_3"),
        *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
    )
)
"""RULER's tasks that can be made at 1024 tokens."""
WITH_QA_1 = (*ESSAYS, "ruler/qa_1")
"""At 2048."""
ALL = (*WITH_QA_1, "ruler/qa_2")
"""From 4096."""
FEW = tuple(f"ruler/{name}" for name in ("niah_single_2", "niah_multikey_1", "vt", "fwe"))
"""One of each kind."""

OURS = ("full", "cake", "dynamickv", "snapkv", "pyramidkv", "streamingllm", "uniform", "random")
FAITHFUL: Mapping[str, Mapping[str, Any]] = {
    "cake, faithful": {"method": "cake", "faithful": True, "window": 32},
    "dynamickv, faithful": {"method": "dynamickv", "faithful": True, "window": 8},
}
"""As released, with the windows of the authors' scripts."""
WINDOW_32: Mapping[str, Mapping[str, Any]] = {
    "snapkv, window 32": {"method": "snapkv", "window_size": 32},
}
"""kvpress's default is 64."""
KVPRESS = ("streamingllm", "expected_attention", "keydiff")


@dataclass(frozen=True)
class Run:
    """One call of ``kvcompress eval``.

    Attributes:
        name: Of its files; an ablation's begins with ``ablation``.
        model: Folder.
        tasks: Names.
        length: Tokens of a prompt.
        prompts: Of each task.
        methods: With their defaults.
        variants: Further methods by label, with parameters.
        budgets: Shares of the prompt.
        backend: Of ``kvcompress eval``.
        protocol: Likewise.
        seed: Of the prompts.
        notes: Lines for the head of the committed file, by name.

    """

    name: str
    model: str
    tasks: Sequence[str]
    length: int
    prompts: int
    methods: Sequence[str] = OURS
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    budgets: Sequence[str] = BUDGETS
    backend: str = "vllm"
    protocol: str = "query-aware"
    seed: int = SEED
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def settings(self) -> int:
        """How many settings each prompt is answered under."""
        compressed = len([m for m in self.methods if m != "full"]) + len(self.variants)
        return compressed * len(self.budgets) + ("full" in self.methods)

    @property
    def answers(self) -> int:
        """How many answers it has."""
        return len(self.tasks) * self.prompts * self.settings

    def arguments(self, output: str) -> list[str]:
        """Words after ``kvcompress``."""
        words = ["eval", "--model", self.model, "--tasks", ",".join(self.tasks)]
        words += ["--lengths", str(self.length), "--prompts", str(self.prompts)]
        words += ["--seeds", str(self.seed), "--protocol", self.protocol]
        words += ["--methods", ",".join(self.methods), "--budgets", ",".join(self.budgets)]
        if self.variants:
            words += ["--variants", json.dumps(self.variants)]
        words += ["--backend", self.backend, "--output", output]
        return words if self.backend == "kvpress" else [*words, "--cache-mib", "1500"]


def _ablation(name: str, about: str, reference: str, **variants: Mapping[str, Any]) -> Run:
    """At 1024 tokens and the two smallest budgets, where parts show."""
    labels = {label.replace("_", " "): entry for label, entry in variants.items()}
    return Run(
        f"ablation-{name}",
        QWEN,
        FEW,
        1024,
        50,
        methods=(),
        variants=labels,
        budgets=SMALL,
        notes={"about": about, "reference": reference},
    )


RUNS: tuple[Run, ...] = (
    Run("qwen-1k", QWEN, ESSAYS, 1024, 50, variants=FAITHFUL),
    Run(
        *("qwen-1k-kvpress", QWEN, ESSAYS, 1024, 50),
        methods=("full", "snapkv"),
        variants=WINDOW_32,
        backend="kvpress",
    ),
)

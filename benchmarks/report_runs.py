"""The runs of report_runs.yaml, from which docs/results.md is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import yaml

SEED = 100
BUDGETS = ("0.069", "0.125", "0.25", "0.5")


@dataclass(frozen=True)
class Run:
    """One call of ``kvcompress eval``.

    Attributes:
        name: Name of its files; an ablation's begins with ``ablation``.
        model: Folder of the model.
        tasks: Names of the tasks.
        length: Tokens of a prompt.
        prompts: Number of prompts of each task.
        methods: Methods with their default parameters.
        variants: Further methods by label, with parameters.
        budgets: Shares of the prompt.
        backend: Argument ``--backend`` of ``kvcompress eval``.
        protocol: Argument ``--protocol`` of ``kvcompress eval``.
        seed: Seed of the prompts.
        about: What an ablation is about, in a sentence; empty for other runs.

    """

    name: str
    model: str
    tasks: Sequence[str]
    length: int
    prompts: int
    methods: Sequence[str]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    budgets: Sequence[str] = BUDGETS
    backend: str = "vllm"
    protocol: str = "query-aware"
    seed: int = SEED
    about: str = ""

    @property
    def notes(self) -> dict[str, str]:
        """Notes for the head of the committed file: an ablation's sentence and first variant."""
        return {"about": self.about, "reference": next(iter(self.variants))} if self.about else {}

    @property
    def settings(self) -> int:
        """Number of settings under which each prompt is answered."""
        compressed = len([m for m in self.methods if m != "full"]) + len(self.variants)
        return compressed * len(self.budgets) + ("full" in self.methods)

    @property
    def answers(self) -> int:
        """Number of answers of the run."""
        return len(self.tasks) * self.prompts * self.settings

    def arguments(self, output: str) -> list[str]:
        """Arguments of ``kvcompress``."""
        words = ["eval", "--model", self.model, "--tasks", ",".join(self.tasks)]
        words += ["--lengths", str(self.length), "--prompts", str(self.prompts)]
        words += ["--seeds", str(self.seed), "--protocol", self.protocol]
        words += ["--methods", ",".join(self.methods), "--budgets", ",".join(self.budgets)]
        if self.variants:
            words += ["--variants", json.dumps(self.variants)]
        words += ["--backend", self.backend, "--output", output]
        return words if self.backend == "kvpress" else [*words, "--cache-mib", "1500"]


@dataclass(frozen=True)
class Bench:
    """One call of ``kvcompress bench``.

    Attributes:
        name: Name of its file, which begins with ``bench``.
        model: Folder of the model.
        words: Further arguments.
        answers: It counts as one.

    """

    name: str
    model: str
    words: Sequence[str]
    answers: ClassVar[int] = 1

    def arguments(self, output: str) -> list[str]:
        """Arguments of ``kvcompress``."""
        return ["bench", "--model", self.model, *self.words, "--output", output]


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

RUNS = tuple(Run(name, **values) for name, values in _FILE["runs"].items())
BENCHES = tuple(Bench(name, **values) for name, values in _FILE["benches"].items())
EVERYTHING: tuple[Run | Bench, ...] = (*RUNS, *BENCHES)

"""Records of an evaluation that nobody has run."""

from collections.abc import Iterable, Iterator
from typing import Any

from vllm_kvcompress.tools.evaluation.record import AWARE, Record

OURS, KVPRESS, PLAIN = "vllm_kvcompress 0.1.0", "kvpress 0.5.5", "vllm 0.32.0"


def record(score: float | None = 1.0, **changes: Any) -> Record:
    """CAKE with an eighth of 1024 tokens on one prompt of variable tracking."""
    values: dict[str, Any] = {
        "model": "tiny",
        "dtype": "bfloat16",
        "source": OURS,
        "task": "ruler/vt",
        "length": 1024,
        "protocol": AWARE,
        "seed": 0,
        "index": 0,
        "label": "cake",
        "method": "cake",
        "params": {},
        "budget": "0.125",
        "block_size": 32,
        "prompt_tokens": 1000,
        "kept_tokens": 128,
        "score": score,
        "nll": None,
        "tokens": 8,
        "text": "an answer",
    }
    return Record(**(values | changes))


def answers(scores: Iterable[float], **changes: Any) -> Iterator[Record]:
    """One record a score, with indices from 0."""
    for index, score in enumerate(scores):
        yield record(score, index=index, **changes)


def full(scores: Iterable[float], **changes: Any) -> Iterator[Record]:
    """The full cache."""
    values = {"label": "full", "method": "none", "budget": "", "kept_tokens": 1000}
    return answers(scores, **(values | changes))


def measured(nlls: Iterable[float], **changes: Any) -> Iterator[Record]:
    """Likelihoods instead of scores."""
    for index, nll in enumerate(nlls):
        yield record(None, index=index, **({"nll": nll, "task": "nll"} | changes))


def small_run() -> list[Record]:
    """Two lengths, two tasks, two budgets, three settings and kvpress; seeds 0 and 1."""
    records: list[Record] = []
    for length in (1024, 2048):
        for task in ("ruler/vt", "ruler/cwe"):
            for seed in (0, 1):
                where: dict[str, Any] = {"length": length, "task": task, "seed": seed}
                records += full([1, 1, 1, 0.5], **where)
                records += full([1, 1, 1, 1], source=PLAIN, **where)
                for budget, kept in (("0.25", 256), ("0.125", 128)):
                    cut: dict[str, Any] = {"budget": budget, "kept_tokens": kept, **where}
                    records += answers([1, 1, 0.5, 0], **cut)
                    records += answers([0, 0, 0, 0], label="random", method="random", **cut)
                    records += answers([1, 0, 0, 0], label="snapkv", method="snapkv", **cut)
                    cut["source"] = KVPRESS
                    records += answers([1, 0, 0, 0], label="snapkv", method="snapkv", **cut)
    return records


def needle_grid() -> list[Record]:
    """Depths 0, 50 and 100 at two lengths, two prompts each."""
    records: list[Record] = []
    for length in (1024, 2048):
        for index in range(6):
            depth = 50 * (index // 2)
            where: dict[str, Any] = {
                "task": "needle",
                "length": length,
                "index": index,
                "labels": {"depth": depth, "city": "Oslo"},
            }
            records.append(record(1.0, label="full", budget="", kept_tokens=1000, **where))
            records.append(record(float(depth == 100 or index == 0), **where))
    return records

"""The figures of a soak, for people and for programs."""

import argparse
import csv
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.soak.books import Books
from benchmarks.soak.watch import OURS, Watch
from vllm_kvcompress.tools.bench.machine import processor

LEAST_MINUTES = 20
"""Of one server's life, below which its memory has not settled and is only shown."""


@dataclass(frozen=True)
class Life:
    """One server, from its start to its end.

    Attributes:
        seconds: How long traffic came.
        metrics: The last that it showed.
        first, last: MiB of all its processes when nothing ran, before traffic and at the end.
        growth: MiB per hour after the first third.
        files: Open files of all processes before traffic and at the end.
        by_process: MiB by process at the end.

    """

    seconds: float
    metrics: dict[str, float]
    first: float
    last: float
    growth: float
    files: tuple[int, int]
    by_process: dict[str, float]

    @classmethod
    def of(cls, watch: Watch, seconds: float) -> "Life":
        """Sum up what was seen of a server.

        Args:
            watch: What looked at it.
            seconds: How long traffic came.

        """
        sizes = [size for _, size in watch.idle] or [0.0]
        files = watch.files or [0]
        return cls(
            seconds, watch.last, sizes[0], sizes[-1], watch.growth(), (files[0], files[-1]),
            watch.by_process,
        )  # fmt: skip


def judge_memory(lives: Sequence[Life], bound: float, books: Books) -> None:
    """Enter a fault for each server whose memory grew.

    Args:
        lives: All servers; short ones have not settled and are not judged.
        bound: MiB per hour that count as flat.
        books: Where faults are entered.

    """
    for life in lives:
        if life.seconds >= LEAST_MINUTES * 60 and life.growth > bound:
            detail = f"grew by {life.growth:.0f} MiB per hour, at most {bound:g} count as flat"
            books.fault("memory", detail)


def write(arguments: argparse.Namespace, books: Books, lives: Sequence[Life]) -> str:
    """Write report.txt, report.json and perhaps a row of a table; return the first.

    Args:
        arguments: Of the command line.
        books: What was counted.
        lives: All servers.

    """
    figures = _figures(arguments, books, lives)
    lines = [f"soak of {figures['minutes']} minutes, seed {arguments.seed}"]
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key}: {number}" for key, number in value.items())]
        else:
            lines.append(f"{name}: {value}")
    lines.append("no faults" if not books.faults else f"FAULTS: {dict(books.faults)}")
    text = "\n".join(lines)
    (arguments.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    (arguments.output / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if arguments.csv is not None:
        flat = {key: value for key, value in figures.items() if not isinstance(value, dict)}
        new = not arguments.csv.exists()
        with arguments.csv.open("a", encoding="utf-8", newline="") as out:
            rows = csv.DictWriter(out, list(flat))
            if new:
                rows.writeheader()
            rows.writerow(flat)
    return text


def _figures(arguments: argparse.Namespace, books: Books, lives: Sequence[Life]) -> dict[str, Any]:
    total: dict[str, float] = {}
    for life in lives:
        for name, value in life.metrics.items():
            total[name] = total.get(name, 0.0) + value
    last = lives[-1] if lives else None
    counts = books.counts

    def metric(name: str) -> float:
        return total.get(name, 0.0)

    return {
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "method": "plain vLLM" if arguments.plain else arguments.method,
        "seed": arguments.seed,
        "minutes": round(sum(life.seconds for life in lives) / 60, 1),
        "rounds": counts["rounds"],
        "requests": sum(books.asked.values()) + counts["aborts"] + counts["requests_of_killed"],
        "answers": counts["answers"],
        "streamed": counts["streamed"],
        "tokens_of_prompts": counts["tokens_of_prompts"],
        "tokens_generated": counts["tokens_generated"],
        "preemptions": int(metric("vllm:num_preemptions_total")),
        "aborts": counts["aborts"],
        "clients_killed": counts["clients_killed"],
        "requests_of_killed": counts["requests_of_killed"],
        "refused_with_400": counts["refused_with_400"],
        "own_settings_refused": counts["own_settings_refused"],
        "requests_compared": counts["requests_compared"],
        "requests_not_compared": counts["requests_not_compared"],
        "answers_equal": counts["answers_equal"],
        "answers_near_tie": counts["answers_near_tie"],
        "answers_unlike": counts["answers_unlike"],
        "largest_drift": max(books.worst_drift.values(), default=0.0),
        "deaths": books.faults["death"],
        "faults": sum(books.faults.values()),
        "blocks_at_the_end": last.metrics.get(f"{OURS}blocks_held") if last else None,
        "mib_before": round(last.first, 1) if last else None,
        "mib_at_the_end": round(last.last, 1) if last else None,
        "mib_per_hour": round(last.growth, 1) if last else None,
        "files_before": last.files[0] if last else None,
        "files_at_the_end": last.files[1] if last else None,
        "requests_by_kind": dict(sorted(books.asked.items())),
        "drift_by_kind": dict(sorted(books.worst_drift.items())),
        "mib_by_process": dict(last.by_process) if last else {},
        "counters": {
            name: value
            for name, value in sorted(total.items())
            if name.startswith(OURS) and ("_total" in name or name.endswith("}"))
            and "layer" not in name and "phase" not in name
        },
        "faults_by_kind": dict(books.faults),
    }  # fmt: skip

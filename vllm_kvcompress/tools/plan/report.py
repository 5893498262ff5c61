"""A plan as JSON, or as tables and two command lines to paste."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.tools.byte_sizes import format_bytes
from vllm_kvcompress.tools.plan.figures import Figures, Workload
from vllm_kvcompress.tools.plan.model import ServedModel
from vllm_kvcompress.tools.plan.server import ServerSettings

PIPED_WIDTH = 100
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class PlanReport:
    """Everything that a plan found.

    Attributes:
        model: The model.
        server: The server.
        work: The requests.
        config: The compression.
        cache_dtype: ``auto`` or ``fp8``.
        token_bytes: Bytes of one token's keys and values in all layers.
        plain: Figures without compression.
        compressed: Figures with compression.
        beside: Bytes that compression holds beside the pool.
        assumed: Sentences on what was assumed and what was not counted.
        notes: Sentences on what is gained.
        shared_flags: Flags of ``vllm serve`` that both command lines have, in pairs.

    """

    model: ServedModel
    server: ServerSettings
    work: Workload
    config: KVCompressionConfig
    cache_dtype: str
    token_bytes: int
    plain: Figures
    compressed: Figures
    beside: int
    assumed: list[str]
    notes: list[str]
    shared_flags: list[tuple[str, str]]

    def commands(self) -> dict[str, list[str]]:
        """Words of both command lines, by ``plain`` and ``compressed``."""
        serve = ["vllm", "serve", self.model.name]
        shared = [word for pair in self.shared_flags for word in pair]
        settings = self.config.as_dict()
        method, budget = settings.pop("method"), settings.pop("budget")
        ours = ["--kv-compression", method, "--kv-compression-budget", str(budget)]
        if settings:
            ours += ["--kv-compression-config", json.dumps(settings)]
        return {"plain": [*serve, *shared], "compressed": [*serve, *shared, *ours]}


def as_json(report: PlanReport) -> str:
    """Return the plan as a JSON object; sizes are in bytes."""
    model = {**asdict(report.model), "dtype": str(report.model.dtype).removeprefix("torch.")}
    value: dict[str, Any] = {
        "model": {**model, "kv_bytes_per_token": report.token_bytes},
        "engine": {**asdict(report.server), "kv_cache_dtype": report.cache_dtype},
        "request": {**asdict(report.work), "prompt": report.work.prompt},
        "kv_compression": report.config.as_dict(),
        "plain": asdict(report.plain),
        "compressed": {**asdict(report.compressed), "beside_the_pool": report.beside},
        "assumed": report.assumed,
        "notes": report.notes,
        "commands": {name: shlex.join(words) for name, words in report.commands().items()},
    }
    return json.dumps(value, indent=2)


def show(report: PlanReport, file: TextIO) -> None:
    """Write tables, notes and command lines."""
    console = Console(
        file=file, width=None if file.isatty() else PIPED_WIDTH, highlight=False, markup=False
    )
    model = report.model
    console.print(model.name, soft_wrap=True)
    which = f" ({model.groups.compressed} compressed)" if model.groups.window_groups else ""
    console.print(
        f"{model.architecture}: {model.layers} layers{which}, {model.kv_heads} KV heads of "
        f"{model.head_size}, {report.token_bytes:,} bytes of KV cache a token"
    )
    console.print(_table(report))
    for title, sentences in (("Notes", report.notes), ("Assumed", report.assumed)):
        if sentences:
            console.print(f"\n{title}")
        for sentence in sentences:
            item = fill(
                sentence,
                console.width,
                initial_indent="* ",
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
            console.print(item, soft_wrap=True)
    plain, compressed = report.commands().values()
    for title, words, figures in (
        ("Plain, to compare", plain, report.plain),
        ("Compressed", compressed, report.compressed),
    ):
        console.print(f"\n{title}{'' if figures.starts else ' (does not start: see the table)'}")
        # Never wrapped: what is pasted must stay one command.
        console.print(_command(words), soft_wrap=True)


def _table(report: PlanReport) -> Table:
    plain, compressed, work = report.plain, report.compressed, report.work
    table = Table()
    table.add_column(f"{work.prompt:,} prompt + {work.output:,} answer tokens")
    table.add_column("plain", justify="right")
    table.add_column(f"{report.config.method} {report.config.budget}", justify="right")

    def row(name: str, write: Callable[[Figures], str], last: bool = False) -> None:
        table.add_row(name, write(plain), write(compressed), end_section=last)

    row("KV-cache memory", lambda f: format_bytes(f.memory))
    row(f"blocks of {report.server.block_size} tokens in the pool", lambda f: f"{f.blocks:,}", True)
    row("blocks of a request after its prefill", lambda f: f"{f.after_prefill:,}")
    row("... with its last token", lambda f: f"{f.at_end:,}")
    row("... at its peak", lambda f: f"{f.peak:,}", True)
    row("requests at one time", lambda f: f"{f.requests:,}" if f.starts else "does not start")
    row(
        f"vLLM's maximum concurrency for {work.context:,} tokens", lambda f: f"{f.concurrency:.2f}x"
    )
    row("longest --max-model-len", lambda f: _length(f.longest, work))
    row("least memory for one such request", lambda f: format_bytes(f.least_memory))
    return table


def _length(tokens: int, work: Workload) -> str:
    return f"{tokens:,} (the model's)" if tokens == work.longest else f"{tokens:,}"


def _command(words: list[str]) -> str:
    """One flag a line, for a shell."""
    head, flags = words[:3], words[3:]
    pairs = [shlex.join(flags[i : i + 2]) for i in range(0, len(flags), 2)]
    return " \\\n    ".join([shlex.join(head), *pairs])

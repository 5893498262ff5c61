#!/usr/bin/env python3
"""Ask a served model two questions about a long text and show what its cache held.

Starts the real `vllm serve` with KV-cache compression on. Blocks and tokens per layer are what the
server itself logged; times are those of this client.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fetch_model import fetch
from modelkit import ModelError
from modelkit.sources import QWEN
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.serving import RunningServer, serve

HERE = Path(__file__).resolve().parent
TEXT = HERE / "data" / "persuasion.txt"
LOG = HERE.parent / ".demo" / "server.log"
NAME = "demo"
OFF = "none"


@dataclass(frozen=True)
class Question:
    words: str
    right: str
    """A pattern that a right answer contains."""


QUESTIONS = (
    Question("What was Captain Benwick formerly on board the Laconia?", r"first lieutenant"),
    Question(
        "For how long had Captain Harville taken his house at Lyme?",
        r"half (a|of a|the) year|half-a-year|(six|6) months",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        first_token: Seconds until the first token of the answer.
        rest: Seconds from there to the last one.
        compression: What the server logged of compressing the prompt; None if it did not.
        pool: What it logged of the pool, when the prompt's blocks came back to it.

    """

    question: Question
    answer: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    first_token: float
    rest: float
    compression: dict[str, Any] | None
    pool: dict[str, Any]

    @property
    def is_right(self) -> bool:
        return re.search(self.question.right, self.answer, re.IGNORECASE) is not None

    @property
    def tokens_per_second(self) -> float:
        return (self.answer_tokens - 1) / self.rest if self.rest > 0 else float("nan")


def ask(console: Console, server: RunningServer, question: Question, patience: float) -> Outcome:
    """Send the text and the question, print the answer while it comes."""
    prompt = (
        f"Read this excerpt from a novel.\n\n{TEXT.read_text(encoding='utf-8').strip()}\n\n"
        f"{question.words} Answer in one short sentence."
    )
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    answer, usage = "", None
    since = server.log.stat().st_size
    console.print(f"\n[bold]{question.words}[/bold]")
    reading = console.status("the model reads the text")
    reading.start()
    begin = time.perf_counter()
    first = last = begin
    try:
        for chunk in client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            if piece := chunk.choices[0].delta.content if chunk.choices else None:
                last = time.perf_counter()
                if not answer:
                    first = last
                    reading.stop()
                answer += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    finally:
        reading.stop()
    console.print()
    if usage is None or not answer:
        raise CommandError(f"The server sent no answer, see {server.log}.")
    details = usage.prompt_tokens_details
    # What is logged may trail the answer a little.
    pools = server.wait_for("KVCOMPRESS_POOL", 1, patience, since)
    compressions = server.lines("KVCOMPRESS", since)
    return Outcome(
        question=question,
        answer=answer,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        answer_tokens=usage.completion_tokens,
        first_token=first - begin,
        rest=last - first,
        compression=compressions[-1] if compressions else None,
        pool=pools[-1] if pools else {},
    )


def summary(outcomes: list[Outcome], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for number in range(1, len(outcomes) + 1):
        table.add_column(f"question {number}", justify="right")

    def row(name: str, values: Iterable[str]) -> None:
        table.add_row(name, *values)

    row("prompt tokens", (str(o.prompt_tokens) for o in outcomes))
    row("... of them from the prefix cache", (str(o.cached_tokens) for o in outcomes))
    every = [outcome.compression for outcome in outcomes]
    if any(every):
        pools = [outcome.pool for outcome in outcomes]
        row("blocks without compression", (str(f["blocks_before"]) if f else "-" for f in every))
        row("blocks held", (str(f["blocks_after"]) if f else "-" for f in every))
        row("blocks given back to the pool", (str(p.get("released", "-")) for p in pools))
        row("blocks free then", (f"{p.get('free', '-')} of {p.get('total', '-')}" for p in pools))
        row(
            "time for compression",
            (f"{sum(f['seconds'].values()):.2f} s" if f else "-" for f in every),
        )
    row("time to first token", (f"{o.first_token:.2f} s" for o in outcomes))
    row("tokens per second after it", (f"{o.tokens_per_second:.1f}" for o in outcomes))
    row("answer", ("[green]right" if o.is_right else "[red]wrong" for o in outcomes))
    return table


def layers(outcomes: list[Outcome]) -> Table:
    """Tokens kept in every layer, a bar for each."""
    kept = [o.compression["tokens_per_layer"] for o in outcomes if o.compression]
    most = max(max(counts) for counts in kept)
    table = Table(title="tokens kept per layer", title_justify="left", box=None)
    table.add_column("layer", justify="right")
    for _ in kept:
        table.add_column("", justify="right")
        table.add_column("")
    for layer, counts in enumerate(zip(*kept, strict=True)):
        cells: list[str | Bar] = []
        for count in counts:
            cells += [str(count), Bar(most, 0, count, width=24)]
        table.add_row(str(layer), *cells)
    return table


def options(args: argparse.Namespace) -> list[str]:
    # 8192 tokens hold the text and its answer. Blocks of 32 are the smallest that vLLM's CPU build
    # takes; budgets are whole blocks, so smaller ones are finer.
    chosen = ["--served-model-name", NAME, "--max-model-len", "8192", "--block-size", "32"]
    chosen += ["--max-num-seqs", "4", "--enable-prompt-tokens-details"]
    if args.method != OFF:
        chosen += ["--kv-compression", args.method, "--kv-compression-budget", args.budget]
        chosen += ["--kv-compression-config", json.dumps({"log_requests": True})]
    if "cpu" in version("vllm"):
        # On CPUs vLLM 0.32 cannot load what it compiled before and would compile at every start.
        chosen.append("--enforce-eager")
    return [*chosen, *args.serve_options]


def run(args: argparse.Namespace, console: Console) -> None:
    """The demo; raises a CommandError if its outcome is not right."""
    model = fetch(args.model, None, "bfloat16", verify=False)
    compressed = args.method != OFF
    unit = "of the prompt" if "." in args.budget else "tokens per layer"
    title = f"{args.method}, {args.budget} {unit}" if compressed else "no compression"
    console.print(f"vllm serve {model}: {title} (log: {args.log})")
    patience = 5.0 if compressed else 0.0
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    if Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    columns = SpinnerColumn(), TextColumn("the server starts"), TimeElapsedColumn()
    with ExitStack() as stack:
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task("", total=None)
            server = stack.enter_context(serve(model, options(args), args.log, args.start_timeout))
        outcomes = [ask(console, server, question, patience) for question in QUESTIONS]

    console.print()
    if any(outcome.compression for outcome in outcomes):
        console.print(layers(outcomes))
    console.print(summary(outcomes, title))
    if compressed and not all(outcome.compression for outcome in outcomes):
        raise CommandError(f"The server logged no compression of these requests, see {args.log}.")
    if not all(outcome.is_right for outcome in outcomes):
        raise CommandError("Not every answer is right.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=QWEN.name, help="a name fetch_model.py knows, a folder or a hub's id"
    )
    parser.add_argument("--method", default="cake", help=f"a method, or '{OFF}' for plain vLLM")
    parser.add_argument("--budget", default="1024", help="tokens per layer, or a ratio in (0, 1)")
    parser.add_argument("--log", type=Path, default=LOG, help="where the server's output goes")
    parser.add_argument(
        "serve_options", nargs="*", metavar="-- OPTION", help="further options of vllm serve"
    )
    parser.add_argument("--start-timeout", type=float, default=600, metavar="SECONDS")
    args = parser.parse_args()
    # A demo that is told to end must take its server along, hence an exception, not the default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(args, Console(highlight=False))
    except (ModelError, OpenAIError, OSError, CommandError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Mixed traffic against a server for an hour: does it live, and does it answer as it does alone?

    python -m benchmarks.soak [--minutes 60] [--seed N] [--plain] [-- MORE OF VLLM SERVE]

Exit code 1 if there was any fault. Each is printed with the request that shows it, and is in
``faults.jsonl`` with all of that request; ``report.txt`` and ``report.json`` have the figures.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from pathlib import Path

from benchmarks.soak.books import Books
from benchmarks.soak.comparison import Bounds
from benchmarks.soak.deck import Deal, read_deck
from benchmarks.soak.report import Life, judge_memory, write
from benchmarks.soak.run import Plan, run_rounds
from benchmarks.soak.served import PARTS, Part, make_adapter, options
from benchmarks.soak.traffic import Dealer
from benchmarks.soak.watch import Watch
from tests.e2e.cut_model import first_layers
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.serving import serve

REPO = Path(__file__).resolve().parents[2]
MOST_DEATHS = 3
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of traffic (default: 60)")
    parser.add_argument("--seed", type=int, help="of the traffic (default: a new one)")
    parser.add_argument("--users", type=int, default=18, help="at one time (default: 18)")
    parser.add_argument("--talks", type=int, default=60, help="in a round's deck (default: 60)")
    parser.add_argument("--round", type=float, default=90, help="seconds of crowd in a round")
    parser.add_argument("--alone", type=float, default=90, help="most seconds of comparing in it")
    parser.add_argument("--tie", type=float, default=0.01, help="nats that make a near tie")
    parser.add_argument("--drift", type=float, default=0.01, help="nats that rounding may move")
    parser.add_argument("--growth", type=float, default=100, help="MiB per hour that count as flat")
    parser.add_argument("--model", type=Path, default=REPO / "models" / "smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=6, help="first layers that are served")
    parser.add_argument("--blocks", type=int, default=80, help="of the pool (default: 80)")
    parser.add_argument("--method", default="cake", help="of the server (default: cake)")
    parser.add_argument("--config", default="{}", help="more of --kv-compression-config, as JSON")
    parser.add_argument("--plain", action="store_true", help="the same traffic for plain vLLM")
    parser.add_argument("--no-seeds", action="store_true", help="no requests with seeds")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS),
        help="servers, one after another (default: all)",
    )  # fmt: skip
    parser.add_argument("--deck", type=Path, help="a faults.jsonl: only its requests")
    parser.add_argument("--output", type=Path, default=REPO / "out" / "soak", help="a folder")
    parser.add_argument("--csv", type=Path, help="takes one more row of figures")
    parser.add_argument("options", nargs="*", help="more words of `vllm serve`, behind --")
    arguments = parser.parse_args(words)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 31)
    return arguments


def main(words: list[str]) -> int:
    """Run the command; its exit code."""
    arguments = parse(words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    books = Books(arguments.output / "faults.jsonl")
    books.file.write_text("", encoding="utf-8")
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)

    model = first_layers(arguments.model, arguments.layers)
    plan = Plan(
        arguments.seed, arguments.users, arguments.round, arguments.alone, arguments.talks,
        Bounds(arguments.tie, arguments.drift),
    )  # fmt: skip
    lives: list[Life] = []
    # As Ctrl-C does: the server ends with us, and what was seen is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in arguments.parts:
            _serve(arguments, PARTS[name], plan, model, books, lives)
    except KeyboardInterrupt:
        books.fault("interrupted", "ended before its time")
    judge_memory(lives, arguments.growth, books)
    print(write(arguments, books, lives), flush=True)
    return 1 if books.faults else 0


def _serve(
    arguments: argparse.Namespace,
    part: Part,
    plan: Plan,
    model: Path,
    books: Books,
    lives: list[Life],
) -> None:
    """Run one part: its server, and after a death another one."""
    print(f"server {part.name}", flush=True)
    adapter = make_adapter(model, arguments.output / "adapter") if part.adapter else None
    deal = _deal(arguments, model, part)
    words = options(arguments, part, model, adapter)
    weight = part.weight / sum(PARTS[name].weight for name in arguments.parts)
    left = arguments.minutes * 60 * weight
    while left > 0 and books.faults["death"] < MOST_DEATHS:
        log = arguments.output / f"server-{len(lives)}.log"
        try:
            with serve(str(model), words, log, 300, ENVIRONMENT) as server:
                began, watch = time.monotonic(), Watch(server)
                try:
                    asyncio.run(run_rounds(plan, deal, watch, books, began + left))
                finally:
                    lives.append(Life.of(watch, time.monotonic() - began))
        except CommandError as error:
            books.fault("start", str(error))
            return
        left -= time.monotonic() - began


def _deal(arguments: argparse.Namespace, model: Path, part: Part) -> Deal:
    if arguments.deck is not None:
        return read_deck(arguments.deck)
    from transformers import AutoTokenizer

    text = (REPO / "scripts" / "data" / "persuasion.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    dealer = Dealer(
        text, tokens, compression=not arguments.plain, seeds=not arguments.no_seeds,
        shares=part.shares, adapter=part.adapter,
    )  # fmt: skip
    return dealer.deal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

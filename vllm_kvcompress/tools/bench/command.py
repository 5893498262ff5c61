"""``kvcompress bench``: speed and memory with compression against plain vLLM, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.arguments import (
    DTYPES,
    STOPPED,
    CommandError,
    add_compression,
    add_engine_arguments,
    check_prefix,
    compression,
    count,
)

if TYPE_CHECKING:
    from vllm_kvcompress.planning.config import KVCompressionConfig
    from vllm_kvcompress.tools.bench.job import BenchJob
    from vllm_kvcompress.tools.bench.rows import BenchRow

CASES = ("ttft", "decode", "throughput")
POOLS = ("bound", "ample")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"must be some of {', '.join(known)}, got {name!r}"
                )
        return names

    return parse


MEASURED: dict[str, tuple[Any, Callable[[str], Any], str, str]] = {
    "cases": (CASES, _names(CASES), "NAMES", "with commas between them"),
    "lengths": ((1024, 4096), _counts, "TOKENS", "of prompts, with commas between them"),
    "batches": ((1, 8), _counts, "N", "requests of a decode step, with commas between them"),
    "steps": (16, count, "N", "decode steps that count in each turn"),
    "pools": (POOLS, _names(POOLS), "NAMES", "for throughput"),
    "requests": (16, count, "N", "of a throughput"),
    "generate": (128, count, "TOKENS", "that each of those generates"),
    "bound_requests": (3, count, "N", "that plain vLLM holds in the bound pool"),
    "seed": (0, lambda text: count(text, 0), "N", "of the prompts' random tokens"),
}
"""Arguments of what is measured: default, type, metavar, help."""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command's arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="speed and memory against plain vLLM, measured in one run",
        description="Measures an engine with compression against plain vLLM; both take turns. "
        "Writes PREFIX.csv and PREFIX.md.",
        usage="%(prog)s --model MODEL --output PREFIX [options]",
    )
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="of the files written"
    )
    parser.add_argument(
        "--rounds", type=count, default=3, metavar="N", help="turns of each (default: %(default)s)"
    )
    add_compression(parser)
    measured = parser.add_argument_group("what is measured")
    for name, (default, kind, metavar, text) in MEASURED.items():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        measured.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )
    engine = parser.add_argument_group("both engines")
    engine.add_argument(
        "--block-size", type=count, default=32, metavar="TOKENS", help="(default: %(default)s)"
    )
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model")
    engine.add_argument(
        "--kv-cache-mib",
        type=count,
        metavar="MIB",
        help="KV cache of each engine, but for the bound pool (default: what the cases need)",
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=count,
        metavar="TOKENS",
        help="(default: the longest prompt in one step)",
    )
    add_engine_arguments(engine)


def run(args: argparse.Namespace) -> int:
    """Measure, write the files as rows come, and print the table.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        CommandError: What the user can put right; rows measured before it stay on disk.

    """
    check_prefix(args.output, (".csv", ".md"))
    job = make_job(args)
    return write(args.output, _settings_shown(job.config, args), _rows(job))


def make_job(args: argparse.Namespace) -> BenchJob:
    """Check everything that can be checked without an engine. Imports vLLM.

    Raises:
        CommandError: What the user can put right.

    """
    from vllm.platforms import current_platform

    from vllm_kvcompress.tools.bench.job import BenchJob
    from vllm_kvcompress.tools.kv_space import check_kv_space
    from vllm_kvcompress.tools.plan.model import read_model
    from vllm_kvcompress.tools.plan.weights import bytes_of_step

    measured = {name: getattr(args, name) for name in MEASURED}
    served, loaded = read_model(args.model, args.dtype)
    mib = args.kv_cache_mib
    check_kv_space("--kv-cache-mib" if mib else "the size of the KV cache that a bench takes")
    job = BenchJob(
        model=args.model,
        served=served,
        weights=bytes_of_step(served, loaded),
        settings=compression(args, args.block_size).as_dict(),
        kinds=measured.pop("cases"),
        rounds=args.rounds,
        block_size=args.block_size,
        dtype=args.dtype,
        cpu=bool(current_platform.is_cpu()),
        kv_bytes=None if mib is None else mib << 20,
        batched_tokens=args.max_num_batched_tokens,
        engine_args=args.engine_args,
        **measured,
    )
    job.setups()
    return job


def write(prefix: Path, settings: dict[str, str], rows: Iterable[BenchRow]) -> int:
    """Write rows as they come, and print the table when they end or are cut off.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        CommandError: A file cannot be written, or the rows raise it.

    """
    from vllm_kvcompress.tools.bench.child_process import say
    from vllm_kvcompress.tools.bench.machine import facts
    from vllm_kvcompress.tools.bench.report import BenchReport

    report = BenchReport(prefix, {**settings, **facts()})
    status = 0
    try:
        for row in rows:
            report.add(row)
    except KeyboardInterrupt:
        say("stopped; what had been measured is kept")
        status = STOPPED
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from error
    finally:
        if report.rows:
            report.show(sys.stdout)
            print(report.csv)
            print(report.markdown)
    return status


def _rows(job: BenchJob) -> Iterable[BenchRow]:
    from vllm_kvcompress.tools.bench.child_process import rows_of

    for setup in job.setups():
        yield from rows_of(job, setup)


def _settings_shown(config: KVCompressionConfig, args: argparse.Namespace) -> dict[str, str]:
    settings = config.as_dict()
    return {
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "method": settings.pop("method"),
        "budget": str(settings.pop("budget")),
        "config": json.dumps(settings) if settings else "",
        "rounds": str(args.rounds),
    }

"""``vllm bench``, plain and compressed, and its own figures side by side."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.bench.block_watch import BlockWatch
from vllm_kvcompress.tools.bench.pairs import Paired, take_turns
from vllm_kvcompress.tools.bench.rows import BenchRow
from vllm_kvcompress.tools.engine_arguments import llm_arguments
from vllm_kvcompress.tools.serving import HOST, run, serve

SERVE = "serve"
METRICS: dict[str, tuple[tuple[str, str, str, bool], ...]] = {
    "latency": (
        ("percentiles.50", "latency of a batch, median", "s", False),
        ("percentiles.90", "latency of a batch, 90th percentile", "s", False),
    ),
    "throughput": (
        ("requests_per_second", "requests a second", "1/s", True),
        ("tokens_per_second", "prompt and answer tokens a second", "tokens/s", True),
    ),
    SERVE: (
        ("median_ttft_ms", "time to first token, median", "ms", False),
        ("median_tpot_ms", "time per output token, median", "ms", False),
        ("median_itl_ms", "time between tokens, median", "ms", False),
        ("request_throughput", "requests a second", "1/s", True),
        ("output_throughput", "output tokens a second", "tokens/s", True),
    ),
}
"""For each benchmark: a figure's place in vLLM's JSON, name, unit, and whether more is better."""

OURS = (
    *("--model", "--output-json", "--save-result", "--result-dir", "--result-filename"),
    *("--host", "--port", "--base-url", "--kv-compression", "--kv-compression-budget"),
    "--kv-compression-config",
)
"""Flags that belong to this command."""


@dataclass(frozen=True)
class VllmJob:
    """A run of ``kvcompress bench --vllm-bench``.

    Attributes:
        kind: A key of :data:`METRICS`.
        model: Folder or hub id.
        config: The compression.
        engine_flags: Words for both engines.
        extra: Words for ``vllm bench``.
        rounds: Turns of each.
        prefix: What the names of vLLM's JSON files and logs begin with.
        timeout: Seconds that a benchmark, or the start of a server, may take.

    """

    kind: str
    model: str
    config: KVCompressionConfig
    engine_flags: tuple[str, ...]
    extra: tuple[str, ...]
    rounds: int
    prefix: Path
    timeout: float


@dataclass(frozen=True)
class VllmResult:
    """What one benchmark measured.

    Attributes:
        figures: vLLM's JSON.
        blocks: Most blocks seen in use; 0: not known.
        pool_blocks: Blocks of the pool; None: not known.

    """

    figures: Mapping[str, Any]
    blocks: int = 0
    pool_blocks: int | None = None


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return vLLM's flags for keyword arguments of its engine."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{flag}", text]
    return words


def check_extra(extra: Sequence[str]) -> None:
    """Refuse words that this command adds itself.

    Raises:
        CommandError: There is one; the message names the first.

    """
    for word in extra:
        if word.partition("=")[0] in OURS:
            raise CommandError(
                f"{word.partition('=')[0]} after -- is set by kvcompress bench itself; leave it out"
            )


def engine_words(job: VllmJob, *, compressed: bool) -> list[str]:
    """Words that start one of the engines, without the model."""
    return [*job.engine_flags, *(flags_of(llm_arguments(job.config)) if compressed else ())]


def measure(job: VllmJob, tell: Callable[[str], object]) -> Iterator[BenchRow]:
    """Run vLLM's benchmark on both engines.

    Args:
        job: What to run.
        tell: Called with a line of progress.

    Yields:
        A row for each of :data:`METRICS`, once all rounds are over.

    Raises:
        CommandError: A benchmark fails, or takes too long.

    """
    begun = 0

    def begin(number: int) -> None:
        nonlocal begun
        begun = number

    def one(compressed: bool) -> VllmResult:
        which = "compressed" if compressed else "plain"
        tell(f"vllm bench {job.kind}, {which}, round {begun} of {job.rounds}")
        return _one(job, compressed, f"{which}-{begun}")

    pairs = take_turns(job.rounds, lambda: one(False), lambda: one(True), begin)
    yield from rows_of(job.kind, pairs)


def rows_of(kind: str, pairs: Sequence[tuple[VllmResult, VllmResult]]) -> Iterator[BenchRow]:
    """Turn vLLM's figures into rows.

    Args:
        kind: A key of :data:`METRICS`.
        pairs: Results of both engines, plain first, by round.

    Raises:
        CommandError: A figure is missing or not above 0.

    """
    plain, compressed = [p for p, _ in pairs], [c for _, c in pairs]
    blocks = (max(r.blocks for r in plain), max(r.blocks for r in compressed))
    for path, name, unit, more in METRICS[kind]:
        yield BenchRow(
            case=f"vllm bench {kind}: {name}",
            unit=unit,
            paired=Paired(
                tuple(_figure(r, kind, path) for r in plain),
                tuple(_figure(r, kind, path) for r in compressed),
                more_is_better=more,
            ),
            pool_blocks=plain[0].pool_blocks,
            blocks=blocks if all(blocks) else None,
        )


def _figure(result: VllmResult, kind: str, path: str) -> float:
    value: Any = result.figures
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or not value > 0:
        raise CommandError(
            f"vllm bench {kind} gives no {path}: it must be a number above 0, got {value!r}"
        )
    return float(value)


def _one(job: VllmJob, compressed: bool, name: str) -> VllmResult:
    out = job.prefix.with_name(f"{job.prefix.name}.{name}.json")
    log = out.with_suffix(".log")
    # A file of an earlier run would otherwise be taken for this one's.
    out.unlink(missing_ok=True)
    flags = engine_words(job, compressed=compressed)
    bench = ["bench", job.kind, "--model", job.model]
    if job.kind != SERVE:
        run([*bench, *flags, *job.extra, "--output-json", str(out)], log, job.timeout)
        return VllmResult(_read(out, log))
    bench += ["--save-result", "--result-dir", str(out.parent), "--result-filename", out.name]
    server_log = out.with_suffix(".server.log")
    with serve(job.model, flags, server_log, job.timeout) as server, BlockWatch(server) as watch:
        where = ["--host", HOST, "--port", str(server.port)]
        run([*bench, *where, *job.extra], log, job.timeout)
    figures = _read(out, log)
    if failed := figures.get("failed"):
        raise CommandError(f"{failed} requests of vllm bench serve failed, see {log}")
    return VllmResult(figures, watch.blocks, watch.pool_blocks)


def _read(out: Path, log: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(out.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CommandError(f"vllm bench wrote no {out}, see {log}") from None

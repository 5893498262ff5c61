"""Both engines take turns at each case; the results are rows."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from vllm_kvcompress.tools.bench.engines import prompts_of, two_engines
from vllm_kvcompress.tools.bench.job import DECODE, TTFT, BenchCase, BenchJob, Setup
from vllm_kvcompress.tools.bench.measure import Decoding, Queue, first_token, run_queue
from vllm_kvcompress.tools.bench.pairs import Paired, take_turns
from vllm_kvcompress.tools.bench.rows import AtBudget, BenchRow
from vllm_kvcompress.tools.bench.stepped_engine import SteppedEngine

Tell = Callable[[str], object]
Pair = tuple[SteppedEngine, SteppedEngine]


def measure(job: BenchJob, setup: Setup, tell: Tell) -> Iterator[BenchRow]:
    """Measure all cases of a setup.

    Yields:
        Rows, each when it is complete.

    Raises:
        CommandError: vLLM or the plugin refuses a setting, or the memory is too small.

    """
    tell(f"starting two engines with {setup.blocks} blocks each ({setup.name} pool)")
    with two_engines(job, setup) as pair:
        for case in setup.cases:

            def say(text: str, case: BenchCase = case) -> None:
                tell(f"{case}, {text}")

            if case.kind == TTFT:
                yield _first_token(job, pair, case, say)
            elif case.kind == DECODE:
                yield _decode(job, pair, case, say)
            else:
                yield from _throughput(job, setup, pair, case, say)


def _first_token(job: BenchJob, pair: Pair, case: BenchCase, tell: Tell) -> BenchRow:
    plain, compressed = pair
    (prompt,) = prompts_of(job, plain, case)
    for number, engine in enumerate(pair):
        tell(f"warming up {number + 1} of 2")
        first_token(engine, prompt)
    before = compressed.phases
    pairs = take_turns(job.rounds, pair, lambda engine: first_token(engine, prompt), tell)
    spent = {
        name: (seconds - before.get(name, 0.0)) / job.rounds
        for name, seconds in compressed.phases.items()
    }
    note = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in spent.items())
    streams = job.config.prefill == "streaming"
    return BenchRow(
        case="time to first token",
        unit="ms",
        paired=Paired(tuple(p * 1e3 for (p, _), _ in pairs), tuple(c * 1e3 for _, (c, _) in pairs)),
        prompt=case.prompt,
        pool_blocks=plain.pool_blocks,
        # The whole prompt is prefilled before anything is evicted, except in a streaming prefill.
        bound=None if streams else 1.0,
        blocks=(max(p for (_, p), _ in pairs), max(c for _, (_, c) in pairs)),
        notes=(f"compression took {note}",) if any(spent.values()) else _whole(job, case),
    )


def _decode(job: BenchJob, pair: Pair, case: BenchCase, tell: Tell) -> BenchRow:
    prompts = prompts_of(job, pair[0], case)
    plain, compressed = batches = (
        Decoding(pair[0], prompts, case.generate),
        Decoding(pair[1], prompts, case.generate),
    )
    for number, batch in enumerate(batches):
        tell(f"reading prompts {number + 1} of 2")
        batch.start()
    pairs = take_turns(
        job.rounds,
        batches,
        lambda batch: batch.step_ms(job.steps),
        tell,
    )
    full, kept = plain.blocks, compressed.blocks
    plain.stop()
    at_budget = _at_budget(job, pair[0], case, compressed, prompts, tell)
    compressed.stop()
    block = pair[0].block_bytes
    read = (
        f"a step reads {job.weights >> 20} MiB of weights and {full * block >> 20} or "
        f"{kept * block >> 20} MiB of KV cache"
    )
    return BenchRow(
        case="decode step",
        unit="ms",
        paired=Paired(tuple(p for p, _ in pairs), tuple(c for _, c in pairs)),
        prompt=case.prompt,
        requests=case.requests,
        pool_blocks=pair[0].pool_blocks,
        # The ratio of the bytes that a step reads.
        bound=(job.weights + full * block) / (job.weights + kept * block),
        at_budget=at_budget,
        blocks=(full, kept),
        running=(case.requests, case.requests),
        preemptions=(0, 0),
        notes=_whole(job, case) or (read,),
    )


def _at_budget(
    job: BenchJob,
    plain: SteppedEngine,
    case: BenchCase,
    compressed: Decoding,
    prompts: list[list[int]],
    tell: Tell,
) -> AtBudget | None:
    """Let a batch that is compressed take turns with plain vLLM at the length that it is left with.

    What a step costs beside that is compression's own: no eviction can make it shorter.
    """
    from vllm_kvcompress.planning.block_planner import BlockPlanner

    cut = BlockPlanner(job.config, job.block_size).prompt_cut(case.prompt)
    if cut is None:
        return None
    length = cut.blocks * job.block_size + compressed.generated
    short = Decoding(plain, [prompt[:length] for prompt in prompts], case.generate)
    tell(f"reading prompts of {length} tokens")
    short.start()
    batches = (short, compressed)
    pairs = take_turns(job.rounds, batches, lambda batch: batch.step_ms(job.steps), tell)
    short.stop()
    return AtBudget(length, Paired(tuple(p for p, _ in pairs), tuple(c for _, c in pairs)))


def _throughput(
    job: BenchJob, setup: Setup, pair: Pair, case: BenchCase, tell: Tell
) -> Iterator[BenchRow]:
    plain, _ = pair
    prompts = prompts_of(job, plain, case)
    for number, engine in enumerate(pair):
        tell(f"warming up {number + 1} of 2")
        run_queue(engine, prompts[:1], min(case.generate, 8))
    pairs = take_turns(
        job.rounds, pair, lambda engine: run_queue(engine, prompts, case.generate), tell
    )
    yield from throughput_rows(job, setup.name, case, pairs, (plain.pool_blocks, plain.block_bytes))


def throughput_rows(
    job: BenchJob,
    pool: str,
    case: BenchCase,
    pairs: list[tuple[Queue, Queue]],
    sizes: tuple[int, int],
) -> Iterator[BenchRow]:
    """Make the rows of tokens a second over whole runs, and over the steps that computed no prompt.

    Args:
        job: The run.
        pool: Name of the engines' pool.
        case: The requests.
        pairs: Runs of both engines, plain first, by round.
        sizes: Blocks that each engine can hand out, and bytes of a block.

    """
    both = [p for p, _ in pairs], [c for _, c in pairs]

    def most(name: str) -> tuple[int, int]:
        plain, compressed = (max(getattr(queue, name) for queue in queues) for queues in both)
        return plain, compressed

    preemptions = sum(q.preemptions for q in both[0]), sum(q.preemptions for q in both[1])
    decoded = all(queue.decode_tokens for queues in both for queue in queues)
    bound = whole = None
    notes = [*_whole(job, case)]
    if decoded:
        plain, compressed = (
            statistics.median(queue.token_bytes(job.weights, sizes[1]) for queue in queues)
            for queues in both
        )
        bound = plain / compressed
        share = statistics.median(queue.prefill_share for queue in both[0])
        # Prefills take as long as in plain vLLM.
        whole = 1 / (share + (1 - share) / bound)
        notes.append(
            f"plain vLLM spends {share:.0%} of the time in steps with a prompt, which compression "
            "does not shorten"
        )
    if any(preemptions):
        notes.append(f"{preemptions[0]} and {preemptions[1]} preemptions")
    row = BenchRow(
        case="throughput",
        unit="tokens/s",
        paired=_rates(pairs, lambda q: q.tokens / q.seconds),
        prompt=case.prompt,
        requests=case.requests,
        generated=case.generate,
        pool=pool,
        pool_blocks=sizes[0],
        bound=whole,
        blocks=most("peak_blocks"),
        running=most("most_running"),
        preemptions=preemptions,
        notes=tuple(notes),
    )
    yield row
    if decoded:
        yield replace(
            row,
            case="decode throughput",
            paired=_rates(pairs, lambda q: q.decode_tokens / q.decode_seconds),
            bound=bound,
            notes=(),
        )


def _rates(pairs: list[tuple[Queue, Queue]], rate: Callable[[Queue], float]) -> Paired:
    return Paired(
        tuple(rate(p) for p, _ in pairs), tuple(rate(c) for _, c in pairs), more_is_better=True
    )


def _whole(job: BenchJob, case: BenchCase) -> tuple[str, ...]:
    from vllm_kvcompress.planning.block_planner import BlockPlanner

    if BlockPlanner(job.config, job.block_size).schedule(case.prompt) is None:
        return ("such prompts are kept whole, so this is what the flag alone costs",)
    return ()

"""What is measured, and the pools that this takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.byte_sizes import format_bytes
from vllm_kvcompress.tools.plan.figures import SlidingWindows
from vllm_kvcompress.tools.plan.model import ServedModel

WARM_STEPS = 4
"""Decode steps before the first that counts: the first of a batch allocates its buffers."""

SETTLE_STEPS = 2
"""Decode steps at the start of each turn that do not count.

The CPU's caches hold the other engine's data, or a step of it has not ended yet.
"""

TTFT, DECODE, THROUGHPUT = KINDS = ("ttft", "decode", "throughput")
BOUND, AMPLE = POOLS = ("bound", "ample")


@dataclass(frozen=True)
class BenchCase:
    """One thing to measure.

    Attributes:
        kind: One of :data:`KINDS`.
        prompt: Tokens of each prompt.
        requests: Number of requests: at one time, or all together where the kind is throughput.
        generate: Most tokens that each generates.

    """

    kind: str
    prompt: int
    requests: int
    generate: int

    @property
    def context(self) -> int:
        """Most tokens of each request."""
        return self.prompt + self.generate

    def __str__(self) -> str:
        return f"{self.kind} {self.requests} x {self.prompt}"


@dataclass(frozen=True)
class Setup:
    """Two engines with one size of the pool, and what is measured on them.

    Attributes:
        name: Name of the pool, one of :data:`POOLS`.
        cases: What is measured.
        blocks: Blocks of the pool, the null block included.
        kv_bytes: Bytes of the pool of each engine.
        batched_tokens: vLLM's max_num_batched_tokens.

    """

    name: str
    cases: tuple[BenchCase, ...]
    blocks: int
    kv_bytes: int
    batched_tokens: int

    @property
    def max_model_len(self) -> int:
        return max(case.context for case in self.cases)

    @property
    def max_num_seqs(self) -> int:
        return max(case.requests for case in self.cases)


@dataclass(frozen=True)
class BenchJob:
    """A run of ``kvcompress bench``.

    Attributes:
        model: Folder or hub id.
        served: The model as vLLM serves it.
        weights: Bytes of weights that a decode step reads.
        settings: The compression, as KVCompressionConfig.parse takes it.
        kinds: Some of :data:`KINDS`, in this order.
        lengths: Tokens of a prompt, for each case.
        batches: Requests of a decode step, for each case.
        pools: Some of :data:`POOLS`, for throughput.
        rounds: Turns of each engine.
        steps: Decode steps that count in each turn.
        requests: Requests of a throughput case.
        generate: Tokens that each request of a throughput case generates.
        bound_requests: Requests that plain vLLM holds in the bound pool.
        block_size: Tokens of a block.
        dtype: The model's dtype, as vLLM takes it.
        cpu: Whether vLLM runs on a CPU.
        kv_bytes: Bytes of each engine's pool, except ``bound``; None: what is needed.
        batched_tokens: vLLM's max_num_batched_tokens; None: the longest prompt in one step.
        engine_args: Further keyword arguments of vLLM for both engines.
        seed: Seed of the prompts.

    """

    model: str
    served: ServedModel
    weights: int
    settings: Mapping[str, Any]
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    pools: tuple[str, ...]
    rounds: int
    steps: int
    requests: int
    generate: int
    bound_requests: int
    block_size: int
    dtype: str
    cpu: bool
    kv_bytes: int | None
    batched_tokens: int | None
    engine_args: Mapping[str, Any]
    seed: int

    @property
    def config(self) -> KVCompressionConfig:
        """The compression; it is parsed here because it cannot be sent to another process."""
        return KVCompressionConfig.parse(dict(self.settings))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the pool."""
        cache_dtype = str(self.engine_args.get("kv_cache_dtype", "auto"))
        return self.served.block_bytes(self.block_size, cache_dtype)

    def setups(self) -> list[Setup]:
        """Pairs of engines, in the order in which they are started.

        Raises:
            CommandError: A case does not fit the model or the memory given.

        """
        found = []
        alone = [*self._alone()]
        if alone:
            found.append(self._setup(AMPLE, alone))
        if THROUGHPUT in self.kinds:
            for length in self.lengths:
                case = BenchCase(THROUGHPUT, length, self.requests, self.generate)
                found += [self._setup(pool, [case]) for pool in self.pools]
        return found

    def _alone(self) -> Iterator[BenchCase]:
        """Cases of one pool; decode cases have more tokens to generate than are measured."""
        if TTFT in self.kinds:
            yield from (BenchCase(TTFT, length, 1, 2) for length in self.lengths)
        if DECODE not in self.kinds:
            return
        for length in self.lengths:
            for batch in self.batches:
                chunk = min(self._step([length], batch), self.config.stream_chunk or length)
                reading = batch * (1 + cdiv(length, chunk))
                # Compressed requests take turns twice: with whole prompts, and with short ones.
                turns = 2 * self.rounds * (SETTLE_STEPS + self.steps)
                yield BenchCase(DECODE, length, batch, reading + WARM_STEPS + turns + 8)

    def _step(self, lengths: Sequence[int], requests: int) -> int:
        """Tokens of a step: the longest prompt, and a token of each other request."""
        return self.batched_tokens or max(lengths) + requests

    def _setup(self, pool: str, cases: Sequence[BenchCase]) -> Setup:
        requests = max(case.requests for case in cases)
        step = self._step([case.prompt for case in cases], requests)
        longest = max(cases, key=lambda case: case.context)
        limit = self.served.max_model_len
        if limit is not None and longest.context > limit:
            raise CommandError(
                f"{longest} takes {longest.context} tokens with what is generated, and the "
                f"model's longest context is {limit}; lower --lengths"
            )
        if step < requests:
            raise CommandError(
                f"--max-num-batched-tokens must be at least {requests}, one token for each "
                f"request of a step, got {step}"
            )
        needed = {case: self._blocks(case, pool, step) for case in cases}
        case, blocks = max(needed.items(), key=lambda item: item[1])
        kv_bytes = blocks * self.block_bytes
        if pool == AMPLE and self.kv_bytes is not None:
            if self.kv_bytes < kv_bytes:
                raise CommandError(
                    f"--kv-cache-mib is too small for {case}, which needs "
                    f"{cdiv(kv_bytes, 2**20)} for each engine, got {self.kv_bytes >> 20}"
                )
            kv_bytes = self.kv_bytes
            blocks = kv_bytes // self.block_bytes
        return Setup(pool, tuple(cases), blocks, kv_bytes, step)

    def _blocks(self, case: BenchCase, pool: str, step: int) -> int:
        """Blocks in which plain vLLM holds as many requests as the pool's name says."""
        lag = 0 if self.cpu else 1
        windows = SlidingWindows(self.served.groups, self.block_size, (1 + lag) * step, lag)
        whole = cdiv(case.context, self.block_size)
        reading = whole + windows.reserved(case.context)
        held = whole + windows.held(case.context)
        if pool == BOUND:
            return min(self.bound_requests, case.requests) * held + reading - held + 2
        # With compression a request holds its prompt and what is kept of it at one time.
        return case.requests * held + 2 * reading + 2


def check_memory(setup: Setup, weights: int, free: int) -> None:
    """Refuse two engines that take more than the bytes that are free, with a CommandError."""
    needed = 2 * (setup.kv_bytes + weights)
    if needed > free:
        raise CommandError(
            f"two engines with {format_bytes(setup.kv_bytes)} of KV cache each for "
            f"{', '.join(map(str, setup.cases))} take {format_bytes(needed)} with the weights, "
            f"and {format_bytes(free)} are free; lower --lengths, --batches or --requests"
        )

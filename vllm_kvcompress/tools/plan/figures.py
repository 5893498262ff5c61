"""Blocks, requests and lengths of a pool, with and without compression."""

from dataclasses import dataclass

from vllm_kvcompress.planning.bisection import largest
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.layer_groups import LayerGroups


@dataclass(frozen=True)
class Workload:
    """Requests that are planned for.

    Attributes:
        context: Tokens of a request, prompt and answer; also the server's --max-model-len.
        output: Answer tokens among them.
        longest: Tokens of the longest context that the model allows.

    """

    context: int
    output: int
    longest: int

    @property
    def prompt(self) -> int:
        return self.context - self.output


@dataclass(frozen=True)
class Pool:
    """The KV cache.

    Attributes:
        memory: Bytes.
        block_bytes: Bytes of a block: a page for each layer of a KV-cache group.
        block_size: Tokens per block.

    """

    memory: int
    block_bytes: int
    block_size: int

    @property
    def blocks(self) -> int:
        """Blocks that vLLM makes of the memory."""
        return self.memory // self.block_bytes

    @property
    def usable(self) -> int:
        """Blocks that can be handed out: vLLM keeps one, the null block."""
        return max(self.blocks - 1, 0)


@dataclass(frozen=True)
class SlidingWindows:
    """Blocks that one request holds in the sliding-window groups; 0 where there are none.

    Attributes:
        layers: The model's layers by kind.
        block_size: Tokens per block.
        in_flight: Most tokens that are scheduled and not processed.
        lag: Steps planned before the last one's result is known.

    """

    layers: LayerGroups
    block_size: int
    in_flight: int
    lag: int

    def reserved(self, tokens: int) -> int:
        """Blocks that vLLM demands at start: SlidingWindowSpec.max_admission_blocks_per_request."""
        seen = min(self.layers.window - 1 + self.in_flight, tokens)
        return self.layers.window_groups * (-(-seen // self.block_size) + 1)

    def read(self, tokens: int) -> int:
        """Most blocks until a prompt of that many tokens is computed; as SlidingWindowGroups."""
        return self.layers.window_group_blocks(self.block_size, tokens, self.in_flight)

    def held(self, tokens: int) -> int:
        """Most blocks while such a request generates; as SlidingWindowGroups counts them."""
        return self.layers.window_group_blocks(self.block_size, tokens, self.lag + 1)


@dataclass(frozen=True)
class Figures:
    """What a pool serves.

    Attributes:
        memory: Bytes of the pool.
        blocks: Blocks of the pool, the null block included.
        after_prefill: Blocks of one request once its prompt has been processed.
        at_end: Blocks of one request with its last token.
        peak: Most blocks that the scheduler counts for one request at any time, with the prefill
            that takes the fewest. Under asynchronous scheduling these are the blocks of prompt,
            survivors and answer together. All three include the most that sliding-window groups
            hold.
        starts: Whether vLLM starts with the context as --max-model-len.
        requests: Such requests that the pool holds at one time, all at their longest.
        concurrency: What vLLM's log calls "Maximum concurrency for N tokens per request".
        longest: Longest --max-model-len with which vLLM starts; 0 if none.
        least_memory: Bytes of the smallest pool that serves one such request.

    """

    memory: int
    blocks: int
    after_prefill: int
    at_end: int
    peak: int
    starts: bool
    requests: int
    concurrency: float
    longest: int
    least_memory: int


def plain_figures(pool: Pool, work: Workload, windows: SlidingWindows) -> Figures:
    """What vLLM serves without compression, by its own rules (kv_cache_utils.py)."""
    size = pool.block_size
    whole = -(-work.context // size)
    at_end, peak = whole + windows.held(work.context), whole + windows.read(work.context)
    reserved = whole + windows.reserved(work.context)
    starts = reserved <= pool.usable
    return Figures(
        memory=pool.memory,
        blocks=pool.blocks,
        after_prefill=-(-work.prompt // size) + windows.held(work.prompt),
        at_end=at_end,
        peak=peak,
        starts=starts,
        requests=1 + (pool.usable - peak) // at_end if starts else 0,
        # vLLM counts the null block here.
        concurrency=pool.blocks / reserved,
        longest=largest(
            0,
            work.longest,
            lambda tokens: -(-tokens // size) + windows.reserved(tokens) <= pool.usable,
        ),
        least_memory=(reserved + 1) * pool.block_bytes,
    )


def compressed_figures(
    pool: Pool, work: Workload, planner: BlockPlanner, windows: SlidingWindows
) -> Figures:
    """What vLLM serves with compression."""
    plain = plain_figures(pool, work, windows)
    least = planner.least_pool(work.context) + windows.reserved(work.context)
    window_group_peak, window_group_held = windows.read(work.context), windows.held(work.context)
    peak = planner.peak_blocks(work.prompt, work.context) + window_group_peak
    schedule = planner.schedule(work.prompt)
    cut = planner.prompt_cut(work.prompt)
    at_end = held = plain.at_end
    if schedule is not None:
        done = schedule.count(work.prompt)
        at_end = schedule.blocks_for(work.context, schedule.count(work.context)) + window_group_held
        held = (
            schedule.peak_blocks(work.context, planner.limits.lag, released=done)
            + window_group_held
        )
    starts = least <= pool.usable
    # Each is admitted at its peak, one after another; those before it are at their longest.
    fits = starts and peak <= pool.usable
    return Figures(
        memory=pool.memory,
        blocks=pool.blocks,
        after_prefill=(cut.blocks + windows.held(work.prompt) if cut else plain.after_prefill),
        at_end=at_end,
        peak=peak,
        starts=starts,
        requests=1 + (pool.usable - peak) // held if fits else 0,
        concurrency=planner.concurrency(
            work.context, pool.usable, window_group_peak, window_group_held
        ),
        longest=longest_model_len(planner, pool.usable, work.longest, windows),
        least_memory=(max(least, peak) + 1) * pool.block_bytes,
    )


def longest_model_len(
    planner: BlockPlanner, usable: int, longest: int, windows: SlidingWindows
) -> int:
    """Longest --max-model-len with which an engine starts.

    Returns:
        Between 0 and longest.

    """

    def starts(tokens: int) -> bool:
        return planner.least_pool(tokens) + windows.reserved(tokens) <= usable

    def last_fits(tokens: int) -> bool:
        return planner.peak_blocks(tokens, tokens + 1) + windows.reserved(tokens) <= usable

    # What one longest prompt holds is quick to find and nearly always what decides.
    guess = largest(0, longest, last_fits)
    if guess > 0 and starts(guess) and (guess == longest or not starts(guess + 1)):
        return guess
    return largest(0, longest, starts)

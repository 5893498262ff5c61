"""Blocks, requests and lengths of a pool, with and without compression."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_kvcompress.planner import Planner


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
        block_bytes: Bytes of a block, over all layers.
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
class Figures:
    """What a pool serves.

    Attributes:
        memory: Bytes of the pool.
        blocks: Blocks of the pool, the null block included.
        after_prefill: Blocks of one request once its prompt has been processed.
        at_end: Blocks of one request with its last token.
        peak: Most blocks that the scheduler counts for one request at any time, on its thriftiest
            way. Under asynchronous scheduling these are the prompt's, the survivors' and the
            answer's together.
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


def block_bytes(layers: int, kv_heads: int, head_size: int, block_size: int, itemsize: int) -> int:
    """Bytes of one block: keys and values of block_size tokens in all layers.

    Args:
        layers: L.
        kv_heads: N.
        head_size: D.
        block_size: Tokens per block.
        itemsize: Bytes of an element of the cache.

    """
    return 2 * layers * kv_heads * head_size * block_size * itemsize


def plain_figures(pool: Pool, work: Workload) -> Figures:
    """What vLLM serves without compression, by its own rules (kv_cache_utils.py)."""
    size = pool.block_size
    whole = -(-work.context // size)
    return Figures(
        memory=pool.memory,
        blocks=pool.blocks,
        after_prefill=-(-work.prompt // size),
        at_end=whole,
        peak=whole,
        starts=whole <= pool.usable,
        requests=pool.usable // whole,
        # vLLM counts the null block here.
        concurrency=pool.blocks / whole,
        longest=min(pool.usable * size, work.longest),
        least_memory=(whole + 1) * pool.block_bytes,
    )


def compressed_figures(pool: Pool, work: Workload, planner: Planner) -> Figures:
    """What vLLM serves with compression.

    Args:
        pool: The KV cache.
        work: The requests.
        planner: Of the engine; its limits are those of the server.

    """
    plain = plain_figures(pool, work)
    least = planner.least_pool(work.context)
    peak = planner.peak_blocks(work.prompt, work.context)
    course = planner.course(work.prompt)
    plan = planner.plan(work.prompt)
    at_end = held = plain.at_end
    if course is not None:
        done = course.count(work.prompt)
        at_end = course.blocks_for(work.context, course.count(work.context))
        held = course.peak_blocks(work.context, planner.limits.lag, released=done)
    starts = least <= pool.usable
    # Each is admitted at its peak, one after another; those before it are at their longest.
    fits = starts and peak <= pool.usable
    return Figures(
        memory=pool.memory,
        blocks=pool.blocks,
        after_prefill=plan.arena_blocks if plan else plain.after_prefill,
        at_end=at_end,
        peak=peak,
        starts=starts,
        requests=1 + (pool.usable - peak) // held if fits else 0,
        concurrency=planner.concurrency(work.context, pool.usable),
        longest=longest_model_len(planner, pool.usable, work.longest),
        least_memory=(max(least, peak) + 1) * pool.block_bytes,
    )


def longest_model_len(planner: Planner, usable: int, longest: int) -> int:
    """Longest --max-model-len with which an engine starts.

    Args:
        planner: Of the engine.
        usable: Blocks that can be handed out.
        longest: Most that the model allows.

    Returns:
        Between 0 and longest.

    """
    # What one longest prompt holds is quick to find and nearly always what decides.
    guess = _last(longest, lambda tokens: planner.peak_blocks(tokens, tokens + 1) <= usable)
    fits = guess > 0 and planner.least_pool(guess) <= usable
    if fits and (guess == longest or planner.least_pool(guess + 1) > usable):
        return guess
    return _last(longest, lambda tokens: planner.least_pool(tokens) <= usable)


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """Largest number of 1 to most for which something holds that holds for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = -(-(low + high) // 2)
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low

"""Running one engine step by step, and timing it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.tools.bench.job import SETTLE_STEPS, WARM_STEPS
from vllm_kvcompress.tools.bench.stepped_engine import Prompts, SteppedEngine


def first_token(engine: SteppedEngine, prompt: Sequence[int]) -> tuple[float, int]:
    """Measure the time to the first token of a request.

    Returns:
        Seconds from the request to its first token, and most blocks held until then.

    """
    blocks = 0
    begin = time.perf_counter()
    # A request gives its blocks back with its last token, so it is asked for one more.
    (request,) = engine.add([prompt], 2)
    while not request.num_output_tokens:
        engine.step()
        blocks = max(blocks, engine.blocks_held)
    seconds = time.perf_counter() - begin
    engine.stop([prompt])
    return seconds, blocks


class Decoding:
    """A batch that generates a few steps in each turn.

    Prompts are prefilled once, however many turns there are.

    Args:
        engine: An engine without requests.
        prompts: Token ids of each.
        generate: More tokens than any request generates.

    Attributes:
        blocks: Most blocks held in a step that was timed.

    """

    def __init__(self, engine: SteppedEngine, prompts: Prompts, generate: int) -> None:
        self._engine = engine
        self._prompts = prompts
        self._generate = generate
        self._requests: list[Any] = []
        self.blocks = 0

    def start(self) -> None:
        """Prefill all prompts and run the first decode steps.

        Raises:
            RuntimeError: A request ended before all prompts were prefilled.

        """
        self._requests = self._engine.add(self._prompts, self._generate)
        while not all(r.num_computed_tokens > r.num_prompt_tokens for r in self._requests):
            self._step()
        for _ in range(WARM_STEPS):
            self._step()

    def turn(self, steps: int) -> list[float]:
        """Return the seconds of so many steps, after the first few of the turn."""
        for _ in range(SETTLE_STEPS):
            self._step()
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - begin)
            self.blocks = max(self.blocks, self._engine.blocks_held)
        return seconds

    def step_ms(self, steps: int) -> float:
        """Return the median of so many steps, in milliseconds."""
        return statistics.median(self.turn(steps)) * 1e3

    @property
    def generated(self) -> int:
        """Tokens that each request has generated at least."""
        return min(int(request.num_output_tokens) for request in self._requests)

    def stop(self) -> None:
        """Abort the requests.

        Raises:
            RuntimeError: One was preempted, so that not every step was a decode step of all.

        """
        self._engine.stop(self._prompts)
        preemptions = sum(request.num_preemptions for request in self._requests)
        if preemptions:
            raise RuntimeError(f"{preemptions} requests were preempted in a pool that holds all")

    def _step(self) -> None:
        self._engine.step()
        if any(request.is_finished() for request in self._requests):
            raise RuntimeError(f"a request has generated its {self._generate} tokens too early")


@dataclass
class Queue:
    """One engine's run of requests that were all queued at the start.

    Attributes:
        seconds: Time of the whole run.
        tokens: All generated tokens.
        decode_seconds: Time of the decode steps, those that computed no prompt.
        decode_steps: Number of decode steps.
        decode_tokens: Tokens generated in decode steps.
        decode_blocks: Blocks held, summed over the decode steps.
        most_running: Most requests past their prefill in one step.
        peak_blocks: Most blocks held.
        preemptions: Number of preemptions.

    """

    seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_blocks: int = 0
    most_running: int = 0
    peak_blocks: int = 0
    preemptions: int = 0

    @property
    def prefill_share(self) -> float:
        """Share of the time that went into steps with a prompt."""
        return 1 - self.decode_seconds / self.seconds

    def token_bytes(self, weights: int, block_bytes: int) -> float:
        """Bytes read for one generated token: the weights in each step, and all blocks held."""
        read = self.decode_steps * weights + self.decode_blocks * block_bytes
        return read / self.decode_tokens


def run_queue(engine: SteppedEngine, prompts: Prompts, generate: int) -> Queue:
    """Run all requests to their end."""
    requests = engine.add(prompts, generate)
    result = Queue(tokens=len(prompts) * generate)
    begin = time.perf_counter()
    while engine.llm_engine.has_unfinished_requests():
        before = sum(r.num_output_tokens for r in requests)
        # Preempted requests compute their prompts again.
        reading = [r for r in requests if r.num_computed_tokens < r.num_prompt_tokens]
        computed = [r.num_computed_tokens for r in reading]
        start = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - start
        made = sum(r.num_output_tokens for r in requests) - before
        running = [r for r in engine.scheduler.running if r.num_output_tokens]
        held = engine.blocks_held
        result.most_running = max(result.most_running, len(running))
        result.peak_blocks = max(result.peak_blocks, held)
        if made and computed == [r.num_computed_tokens for r in reading]:
            result.decode_seconds += seconds
            result.decode_steps += 1
            result.decode_tokens += made
            result.decode_blocks += held
    result.seconds = time.perf_counter() - begin
    result.preemptions = sum(r.num_preemptions for r in requests)
    return result

"""Driving one engine step by step, and timing it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.tools.bench.job import SETTLE_STEPS, WARM_STEPS
from vllm_kvcompress.tools.bench.stepped_engine import Prompts, SteppedEngine


def first_token(subject: SteppedEngine, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds from the request to its first token, and most blocks held until then.

    Args:
        subject: An engine without requests.
        prompt: Token ids.

    """
    blocks = 0
    begin = time.perf_counter()
    # A request's blocks are gone with its last token, so it is asked for one more.
    (request,) = subject.add([prompt], 2)
    while not request.num_output_tokens:
        subject.engine.step()
        blocks = max(blocks, subject.blocks_held)
    seconds = time.perf_counter() - begin
    subject.stop([prompt])
    return seconds, blocks


class Decoding:
    """A batch that goes on generating, a few steps at a time.

    Prompts are read once, however many turns there are.

    Args:
        subject: An engine without requests.
        prompts: Token ids of each.
        generate: More tokens than any request comes to.

    Attributes:
        blocks: Most blocks held in a step that was timed.

    """

    def __init__(self, subject: SteppedEngine, prompts: Prompts, generate: int) -> None:
        self._subject = subject
        self._prompts = prompts
        self._generate = generate
        self._requests: list[Any] = []
        self.blocks = 0

    def start(self) -> None:
        """Read all prompts and make the first steps.

        Raises:
            RuntimeError: A request came to its end before all were read.

        """
        self._requests = self._subject.add(self._prompts, self._generate)
        while not all(r.num_computed_tokens > r.num_prompt_tokens for r in self._requests):
            self._step()
        for _ in range(WARM_STEPS):
            self._step()

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of some steps, the first few of the turn left out.

        Args:
            steps: How many.

        """
        for _ in range(SETTLE_STEPS):
            self._step()
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - begin)
            self.blocks = max(self.blocks, self._subject.blocks_held)
        return seconds

    def stop(self) -> None:
        """Let go of the requests.

        Raises:
            RuntimeError: One was thrown out on the way, so that steps were not what they seemed.

        """
        self._subject.stop(self._prompts)
        thrown_out = sum(request.num_preemptions for request in self._requests)
        if thrown_out:
            raise RuntimeError(f"{thrown_out} requests were preempted in a pool that holds all")

    def _step(self) -> None:
        self._subject.engine.step()
        if any(request.is_finished() for request in self._requests):
            raise RuntimeError(f"a request has generated its {self._generate} tokens too early")


@dataclass
class Queue:
    """One engine's way through more requests than may fit.

    Attributes:
        seconds: Of the whole run.
        tokens: All generated tokens.
        decode_seconds: Of the steps that computed no prompt.
        decode_steps: How many of those there were.
        decode_tokens: Tokens generated in those.
        decode_blocks: Blocks held, summed over those.
        most_running: Most requests past their prefill in one step.
        peak_blocks: Most blocks held.
        preemptions: Requests thrown out and computed again.

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


def run_queue(subject: SteppedEngine, prompts: Prompts, generate: int) -> Queue:
    """Run all requests to their end.

    Args:
        subject: An engine without requests.
        prompts: Token ids of each.
        generate: Tokens that each generates.

    """
    engine, scheduler = subject.engine, subject.scheduler
    requests = subject.add(prompts, generate)
    result = Queue(tokens=len(prompts) * generate)
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        before = sum(r.num_output_tokens for r in requests)
        # Those that were thrown out compute their prompts again.
        reading = [r for r in requests if r.num_computed_tokens < r.num_prompt_tokens]
        come_to = [r.num_computed_tokens for r in reading]
        start = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - start
        made = sum(r.num_output_tokens for r in requests) - before
        running = [r for r in scheduler.running if r.num_output_tokens]
        held = subject.blocks_held
        result.most_running = max(result.most_running, len(running))
        result.peak_blocks = max(result.peak_blocks, held)
        if made and come_to == [r.num_computed_tokens for r in reading]:
            result.decode_seconds += seconds
            result.decode_steps += 1
            result.decode_tokens += made
            result.decode_blocks += held
    result.seconds = time.perf_counter() - begin
    result.preemptions = sum(r.num_preemptions for r in requests)
    return result

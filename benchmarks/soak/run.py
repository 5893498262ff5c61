"""Rounds of a soak: a crowd, then silence, then the same requests alone."""

import asyncio
import random
import time
import uuid
from dataclasses import dataclass

from openai import AsyncOpenAI, OpenAIError

from benchmarks.soak.asks import Ask
from benchmarks.soak.books import Books
from benchmarks.soak.client import make_client, send
from benchmarks.soak.comparison import Bounds, compare
from benchmarks.soak.crowd import LONGEST_WAIT, Crowd
from benchmarks.soak.deck import Deal
from benchmarks.soak.watch import OURS, Watch

PING = Ask("ping", False, {"prompt": "Hello", "max_tokens": 1, "temperature": 0})


@dataclass(frozen=True)
class Plan:
    """How long and how much.

    Attributes:
        seed: Of all traffic.
        users: At one time.
        crowd_seconds: Of crowd in a round.
        alone_seconds: Most seconds that the requests of a round are asked alone.
        talks: In the deck of a round.
        bounds: What rounding can do.

    """

    seed: int
    users: int
    crowd_seconds: float
    alone_seconds: float
    talks: int
    bounds: Bounds


async def run_rounds(plan: Plan, deal: Deal, watch: Watch, books: Books, end: float) -> None:
    """Run rounds until the time is over or the server is gone.

    Args:
        plan: How long and how much.
        deal: Draws the requests.
        watch: Looks at the server.
        books: Where everything is counted; their ``rounds`` tell which round comes next.
        end: When to stop, by the monotonic clock.

    """
    server = watch.server
    async with make_client(server.url, LONGEST_WAIT) as client:
        await _settle(client, watch, books)
        while (left := end - time.monotonic()) > 0:
            number = books.counts["rounds"]
            seed = f"{plan.seed} round {number}"
            talks = deal(random.Random(seed), plan.talks)
            crowd = Crowd(client, server, books)
            # Crowd and comparison share what is left.
            share = plan.crowd_seconds / (plan.crowd_seconds + plan.alone_seconds)
            seconds = min(plan.crowd_seconds, left * share)
            alive = await crowd.gather(talks, seconds, plan.users, seed)
            books.counts["rounds"] += 1
            _read_log(watch, books)
            if not alive or not await _settle(client, watch, books):
                return
            until = time.monotonic() + min(plan.alone_seconds, max(end - time.monotonic(), 10))
            await _compare_alone(client, crowd, plan.bounds, books, until)
            if not await _settle(client, watch, books):
                return
            print(_line(number, books, watch), flush=True)


async def _settle(client: AsyncOpenAI, watch: Watch, books: Books) -> bool:
    """Wait until nothing runs, look at memory, pool and log; whether the server lives."""
    alive = True
    for _ in range(60):
        found = watch.metrics()
        waiting = [v for k, v in found.items() if k.startswith("vllm:num_requests_")]
        if found and not any(waiting):
            break
        await asyncio.sleep(1)
    try:
        # Figures come with the next step's: what aborts have freed shows after one more request.
        async with asyncio.timeout(60):
            await send(client, PING)
    except (OpenAIError, TimeoutError):
        alive = False
    _read_log(watch, books)
    if not alive or watch.server.get("/health", timeout=30) is None:
        books.died(str(watch.server.log))
        return False
    await asyncio.sleep(1)
    found = watch.metrics()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        _must_be_0(f"vllm:{name}", found, books)
    if any(name.startswith(OURS) for name in found):
        for name in ("blocks_held", "blocks_reserved"):
            _must_be_0(f"{OURS}{name}", found, books)
    watch.look()
    return True


def _read_log(watch: Watch, books: Books) -> None:
    """Enter errors of the log; the engine's end makes many."""
    errors = watch.complaints()
    for error in errors[:5]:
        lines = [line for line in error.splitlines() if "rror" in line]
        books.fault("log", (lines or [error])[-1][:300], whole=error, of=len(errors))


def _must_be_0(name: str, found: dict[str, float], books: Books) -> None:
    if found.get(name) != 0:
        books.fault("not idle", f"{name} is {found.get(name)} although nothing runs")


async def _compare_alone(
    client: AsyncOpenAI, crowd: Crowd, bounds: Bounds, books: Books, end: float
) -> None:
    """Ask each of the crowd's requests again, one at a time, and compare."""
    for number, (ask, answers) in enumerate(crowd.answers.values()):
        if time.monotonic() > end:
            left = len(crowd.answers) - number
            books.counts["requests_not_compared"] += left
            return
        # With another salt there is nothing in the prefix cache for it.
        extra = {"cache_salt": uuid.uuid4().hex, "return_tokens_as_token_ids": True}
        extra |= {"logprobs": True, "top_logprobs": 5} if ask.chat else {"logprobs": 5}
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                alone = await send(client, ask, extra=extra)
        except (OpenAIError, TimeoutError) as error:
            books.fault(f"alone: {type(error).__name__}", str(error), ask)
            if crowd.server.get("/health") is None:
                return
            continue
        books.counts["requests_compared"] += 1
        sampled = ask.body["temperature"] > 0
        for answer in answers:
            found = compare(answer, alone, bounds, sampled=sampled, parsed="tools" in ask.body)
            books.counts[f"answers_{found.verdict.replace(' ', '_')}"] += 1
            if found.verdict != "unlike":
                worst = max(books.worst_drift.get(ask.kind, 0.0), found.drift)
                books.worst_drift[ask.kind] = round(worst, 6)
            else:
                tokens = {i: c.tokens for i, c in answer.choices.items()}
                expected = {i: c.tokens for i, c in alone.choices.items()}
                books.fault("unlike", found.reason, ask, crowd=tokens, alone=expected)


def _line(number: int, books: Books, watch: Watch) -> str:
    counts = books.counts
    return (
        f"round {number}: {sum(books.asked.values())} requests, {counts['answers']} answers, "
        f"{counts['aborts']} aborts, {counts['clients_killed']} kills, "
        f"{counts['answers_equal']} equal, {counts['answers_near_tie']} near ties, "
        f"{counts['answers_unlike']} unlike, {watch.metrics().get('vllm:num_preemptions_total')} "
        f"preemptions, {watch.idle[-1][1]:.0f} MiB, {sum(books.faults.values())} faults"
    )

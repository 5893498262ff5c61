"""Many clients at once: users who ask, users who go away, and processes that are killed."""

import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI, OpenAIError

from benchmarks.soak.asks import Answer, Ask
from benchmarks.soak.books import Books
from benchmarks.soak.client import NAME, complaint, send
from benchmarks.soak.traffic import Talk
from vllm_kvcompress.tools.serving import HOST, RunningServer

LONGEST_WAIT = 180
"""Seconds after which a request counts as lost."""

DOOMED = Path(__file__).with_name("doomed_client.py")


class ServerGoneError(Exception):
    """There is nobody to ask any more."""


@dataclass
class Crowd:
    """Clients of one server.

    Attributes:
        client: What they send with.
        server: Which.
        books: Where everything is counted.
        answers: Answers of requests that must be the same alone, by the request's key.

    """

    client: AsyncOpenAI
    server: RunningServer
    books: Books
    answers: dict[str, tuple[Ask, list[Answer]]] = field(default_factory=dict)
    _users: int = 0
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def gather(self, talks: Sequence[Talk], seconds: float, users: int, seed: str) -> bool:
        """Let users ask for some time, and wait until the last has its answer.

        False if the server has gone, which is then in the books.

        Args:
            talks: What they ask; each is drawn many times.
            seconds: After which no user begins anything new.
            users: Users at one time; one process of doomed clients comes on top.
            seed: Of what they draw.

        """
        end = time.monotonic() + seconds
        self._users, alive = users, True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._look_after())
                group.create_task(self._kill(talks, random.Random(f"{seed} kill"), end))
                for user in range(users):
                    dice = random.Random(f"{seed} user {user}")
                    group.create_task(self._user(talks, dice, end))
        except* ServerGoneError:
            alive = False
        return alive

    async def _look_after(self) -> None:
        """End the crowd when there is no server any more."""
        missed = 0
        while self._users:
            await asyncio.sleep(1)
            page = await asyncio.to_thread(self.server.get, "/health", 10)
            missed = missed + 1 if page is None else 0
            if missed == 3:
                self.books.died(str(self.server.log))
                raise ServerGoneError

    async def _user(self, talks: Sequence[Talk], dice: random.Random, end: float) -> None:
        while time.monotonic() < end:
            # Bursts: now nobody asks, now all do.
            await asyncio.sleep(dice.choice([0, 0, 0, 0.3, 2]))
            talk = dice.choice(talks)
            if dice.random() < 0.15:
                await self._leave(talk.request([]), dice)
            else:
                await self._talk(talk, dice, end)
        self._users -= 1

    async def _talk(self, talk: Talk, dice: random.Random, end: float) -> None:
        said: list[str] = []
        for _ in talk.turns or ("",):
            answer = await self.ask(talk.request(said), dice)
            if answer is None or time.monotonic() > end:
                return
            said.append(answer.choices[0].text)

    async def ask(self, ask: Ask, dice: random.Random) -> Answer | None:
        """Send a request as one of the crowd; its answer if it was right."""
        streamed = ask.streams and dice.random() < 0.5
        extra = {"priority": dice.choice([0, 0, 0, -1, 1, 3])}
        number, began = next(self._numbers), time.monotonic()
        self.books.asked[ask.kind] += 1
        self.books.counts["streamed"] += streamed
        self.books.in_flight[number] = ask
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                answer = await send(self.client, ask, streamed=streamed, extra=extra)
        except (OpenAIError, TimeoutError) as error:
            self._failed(ask, error, time.monotonic() - began)
            return None
        finally:
            del self.books.in_flight[number]
        if ask.refused:
            self.books.fault("accepted", "wrong settings were served", ask)
            return None
        self.books.counts["answers"] += 1
        self.books.counts["tokens_generated"] += answer.completion_tokens
        self.books.counts["tokens_of_prompts"] += answer.prompt_tokens
        if wrong := complaint(ask, answer):
            self.books.fault("wrong answer", f"it {wrong}", ask, streamed=streamed)
            return None
        if ask.same_alone:
            self.answers.setdefault(ask.key, (ask, []))[1].append(answer)
        return answer

    def _failed(self, ask: Ask, error: Exception, seconds: float) -> None:
        status = error.status_code if isinstance(error, APIStatusError) else None
        if status is None and isinstance(error, APIError) and error.code is not None:
            status = int(error.code)  # an event of a stream
        if ask.refused and status == 400:
            self.books.counts["refused_with_400"] += 1
            return
        if status == 400 and "vllm_xargs" in ask.body:
            # A combination that this server does not take: worth a look, and no fault.
            self.books.note("own_settings_refused", str(error).removeprefix("Error code: 400 - "))
            return
        what = f"status {status}" if status else type(error).__name__
        why = f" ({error.__cause__!r})" if error.__cause__ else ""
        self.books.fault(what, f"{error}{why} after {seconds:.1f} s", ask)

    async def _leave(self, ask: Ask, dice: random.Random) -> None:
        """Ask and go away: in the prefill, in a stream, or before an answer in one piece."""
        self.books.counts["aborts"] += 1
        streamed = ask.streams and dice.random() < 0.7
        events = dice.choice([1, 2, 5, 20]) if streamed and dice.random() < 0.6 else None
        patience = LONGEST_WAIT if events else dice.choice([0.02, 0.1, 0.3, 1, 3])
        # Long enough to be left.
        more: dict[str, Any] = {"max_tokens": 200}
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await send(self.client, ask, streamed=streamed, leave_after=events, extra=more)
        except TimeoutError:
            if events:
                self.books.fault("TimeoutError", f"no event within {patience} s", ask)
        except OpenAIError as error:
            self._failed(ask, error, time.monotonic() - began)

    async def _kill(self, talks: Sequence[Talk], dice: random.Random, end: float) -> None:
        """Run processes of clients, one after another, and kill each at some moment."""
        while time.monotonic() < end:
            asks = [dice.choice(talks).request([]) for _ in range(dice.randrange(1, 5))]
            lines = []
            for ask in asks:
                body = {"model": NAME, **ask.body, "stream": True, "max_tokens": 200}
                lines.append(json.dumps([ask.path, body]) + "\n")
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(DOOMED), HOST, str(self.server.port),
                stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("".join(lines).encode())
            process.stdin.close()
            # Before the first byte of an answer, or some time after it.
            patience = dice.choice([0.4, 1, 3])
            if dice.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.stdout.readline(), 20)
                patience = dice.choice([0, 0.2, 1])
            await asyncio.sleep(patience)
            if process.returncode is None:
                process.kill()
                self.books.counts["clients_killed"] += 1
                self.books.counts["requests_of_killed"] += len(asks)
            # Reads what is left, or the pipe would keep it.
            await process.communicate()
            await asyncio.sleep(dice.choice([1, 3, 6]))

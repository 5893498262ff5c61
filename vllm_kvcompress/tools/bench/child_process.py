"""Measuring one setup in a child process.

With the process all memory of its engines is freed, on a GPU as well, and the next setup's plain
engine starts with vLLM's own attention classes.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.bench.job import BenchJob, Setup
from vllm_kvcompress.tools.bench.rows import BenchRow

PATIENCE = 10.0
"""Seconds that a process has to end, each time that it is told to."""


def rows_of(job: BenchJob, setup: Setup) -> Iterator[BenchRow]:
    """Measure a setup; progress goes to stderr.

    Yields:
        Rows, each when it is complete.

    Raises:
        CommandError: As in the process.
        RuntimeError: The process ended before its last row; its stderr says why.

    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(job, setup, there))
    process.start()
    there.close()
    try:
        yield from _received(here)
    finally:
        here.close()
        # After Ctrl-C the process has had the signal as well, and stops its engines.
        process.join(PATIENCE)
        for end in (process.terminate, process.kill):
            if process.is_alive():
                end()
                process.join(PATIENCE)


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"kvcompress bench: {text}", file=sys.stderr, flush=True)


def _received(here: Connection) -> Iterator[BenchRow]:
    while True:
        try:
            message: Any = here.recv()
        except EOFError:
            raise RuntimeError("the process with the engines ended before its last row") from None
        if message is None:
            return
        if isinstance(message, str):
            raise CommandError(message)
        yield message


def _measure(job: BenchJob, setup: Setup, there: Connection) -> None:
    from vllm_kvcompress.tools.bench.cases import measure

    try:
        for row in measure(job, setup, say):
            say(f"{row.title}: {row.paired.ratio:.2f} times as fast")
            there.send(row)
        there.send(None)
    except CommandError as error:
        there.send(str(error))
    except (KeyboardInterrupt, BrokenPipeError):
        # The parent has been interrupted as well, and says so.
        sys.exit(130)

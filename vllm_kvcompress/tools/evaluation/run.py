"""The part of ``kvcompress eval`` that runs."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_kvcompress.tools.arguments import (
    STOPPED,
    CommandError,
    check_folder,
    numbers,
    split,
)
from vllm_kvcompress.tools.bench.machine import hardware
from vllm_kvcompress.tools.engine_arguments import check_engine_arguments
from vllm_kvcompress.tools.evaluation import tasks
from vllm_kvcompress.tools.evaluation.backend import Backend
from vllm_kvcompress.tools.evaluation.json_lines import append_line
from vllm_kvcompress.tools.evaluation.record import PROTOCOLS, RECORDS, Store
from vllm_kvcompress.tools.evaluation.runner import PromptSet, Runner, longest, prepare
from vllm_kvcompress.tools.evaluation.setting import Setting
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Source

PACKAGES = ("vllm_kvcompress", "vllm", "torch", "transformers", "kvpress", "triton")

RUNS = "runs.jsonl"
"""File with a line for each call and batch: command line, versions, answers, seconds."""


def evaluate(args: argparse.Namespace, settings: list[Setting], words: Sequence[str]) -> int:
    """Have the missing answers made, and write tables and plots.

    Args:
        args: Parsed arguments.
        settings: Settings that are compared.
        words: Words of the command line.

    Returns:
        0, or 130 after an interrupt.

    Raises:
        CommandError: An argument is not a number, or the results cannot be written.
        EvaluationError: The user can correct tasks, data, settings or engine options.

    """
    console = Console(stderr=True)
    _check(args, settings)
    store = Store(args.output / RECORDS)
    cells = [
        PromptSet(task, length, protocol, seed, args.prompts)
        for length in numbers(args.lengths, "lengths", 1)
        for protocol in (PROTOCOLS if args.protocol == "both" else (args.protocol,))
        for task in tasks.find(split(args.tasks), args.longbench_hub)
        for seed in numbers(args.seeds, "seeds")
    ]
    source = Source(args.model, _tokenizer(args.model), args.data, args.output / "prompts")
    with console.status(f"making prompts of {len(cells)} cells"):
        batches = prepare(cells, source)
    prompts = sum(len(batch.cases) for batch in batches)
    console.print(
        f"{len(batches)} cells, {prompts} prompts of up to {longest(batches)} tokens, "
        f"{len(settings)} settings: {prompts * len(settings)} answers"
    )
    if args.dry_run:
        return 0
    backend = _backend(args, longest(batches))
    try:
        runner = Runner(backend, args.model, args.dtype, store)
        stopped = _answer(runner, batches, settings, words, console)
    finally:
        backend.close()
    if stopped and not len(store):
        return STOPPED
    from vllm_kvcompress.tools.evaluation.markdown_page import write_results

    try:
        page, *_ = write_results(args.output, command=_command(words), versions=versions())
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from error
    console.print(f"written: {page}")
    return STOPPED if stopped else 0


def versions() -> dict[str, str]:
    """Versions of the packages that took part, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _answer(
    runner: Runner,
    batches: Sequence[PromptSet],
    settings: Sequence[Setting],
    words: Sequence[str],
    console: Console,
) -> bool:
    """Answer what is missing; whether the user stopped it."""
    missing = sum(runner.missing(batch, settings) for batch in batches)
    path = runner.store.path
    console.print(f"{missing} answers to go, {len(runner.store)} in {path}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    stopped = False
    with Progress(*columns, console=console) as bar:
        row = bar.add_task("answers", total=missing)
        for batch in batches:
            start, answers = time.perf_counter(), 0
            name = f"{batch.task.name} {batch.length}"
            bar.update(row, description=name)
            try:
                for _ in runner.run(batch, settings):
                    answers += 1
                    bar.advance(row)
            except KeyboardInterrupt:
                console.print("stopped: the same command goes on from here")
                stopped = True
            if answers:
                _log(path.with_name(RUNS), batch, answers, time.perf_counter() - start, words)
            if stopped:
                break
    return stopped


def _log(path: Path, batch: PromptSet, answers: int, seconds: float, words: Sequence[str]) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": batch.task.name,
        "length": batch.length,
        "protocol": batch.protocol,
        "seed": batch.seed,
        "answers": answers,
        "seconds": round(seconds, 1),
        "command": _command(words),
        "versions": versions(),
        "device": hardware(),
    }
    append_line(path, line)


def _check(args: argparse.Namespace, settings: Sequence[Setting]) -> None:
    """Refuse before anything is made what would only show after the prompts or with the engine."""
    check_folder(args.output, (RECORDS, RUNS, "results.md", "cells.csv"))
    if args.backend == "kvpress":
        try:
            from vllm_kvcompress.tools.evaluation.kvpress_backend import check_setting
        except ImportError as error:
            raise CommandError(
                f"--backend kvpress runs in an environment of its own, which "
                f"scripts/setup_kvpress_env.sh makes: {error}"
            ) from error
        for setting in settings:
            check_setting(setting, args.block_size)
        return
    from vllm_kvcompress.tools.evaluation.vllm_backend import check_settings

    check_settings(settings, args.block_size, plain=args.backend == "plain")
    if args.engine_args:
        check_engine_arguments(args.engine_args)


def _backend(args: argparse.Namespace, max_model_len: int) -> Backend:
    if args.backend == "kvpress":
        from vllm_kvcompress.tools.evaluation.kvpress_backend import KvpressBackend

        return KvpressBackend(args.model, dtype=args.dtype, block_size=args.block_size)
    from vllm_kvcompress.tools.evaluation.vllm_backend import VllmBackend

    return VllmBackend(
        args.model,
        dtype=args.dtype,
        block_size=args.block_size,
        max_model_len=max_model_len,
        cache_mib=args.cache_mib,
        plain=args.backend == "plain",
        engine_args=args.engine_args,
    )


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--model: {model} has no usable tokenizer") from error


def _command(words: Sequence[str]) -> str:
    return shlex.join(["kvcompress", *words]) if words else Path(sys.argv[0]).name

#!/usr/bin/env python3
"""Answer the prompts of a JSONL file, with or without KV-cache compression.

Input: one object a line with "prompt" (a text to continue) or "messages" (a chat), and "id"
(the number of the line if there is none). Output: one object a line with "id", "answer",
"prompt_tokens", "output_tokens" and "finish_reason"; a prompt that vLLM refuses gets a null answer
and "error". Run the same command again after a kill and it goes on where it was.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jsonl_jobs import (
    JobError,
    Prompt,
    append_answers,
    output_file,
    read_prompts,
    remaining,
)

Answer = dict[str, Any]


def describe(prompt: Prompt, output: Any) -> Answer:
    completion = output.outputs[0]
    return {
        "id": prompt.id,
        "answer": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def run_batch(llm: Any, sampling: Any, batch: list[Prompt]) -> list[Answer]:
    """Answers to all of the batch."""
    texts = [prompt for prompt in batch if prompt.prompt is not None]
    chats = [prompt for prompt in batch if prompt.messages is not None]
    outputs: list[Any] = []
    if texts:
        outputs += llm.generate([p.prompt for p in texts], sampling, use_tqdm=False)
    if chats:
        outputs += llm.chat([p.messages for p in chats], sampling, use_tqdm=False)
    return [describe(prompt, output) for prompt, output in zip(texts + chats, outputs, strict=True)]


def answer_batch(llm: Any, sampling: Any, batch: list[Prompt]) -> list[Answer]:
    """As `run_batch`; a prompt that vLLM refuses does not take the others along."""
    try:
        return run_batch(llm, sampling, batch)
    except ValueError as error:
        if len(batch) > 1:
            return [a for prompt in batch for a in answer_batch(llm, sampling, [prompt])]
        refused = {"answer": None, "prompt_tokens": None, "output_tokens": 0}
        return [{"id": batch[0].id, **refused, "finish_reason": "error", "error": str(error)}]


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    chosen: dict[str, Any] = {"model": args.model}
    for name in ("kv_compression", "kv_compression_budget", "kv_compression_config"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    return {**chosen, **args.engine_args}


def work(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.input)
    with output_file(args.output) as file:  # what is wrong here shows before the engine starts
        todo = remaining(prompts, file, args.output)
    console = Console(stderr=True)
    console.print(f"{len(prompts)} prompts, {len(prompts) - len(todo)} answered already")
    if not todo:
        return

    # Imported here: vLLM takes seconds, which --help and a mistake in a file need not wait for.
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    try:
        llm = LLM(**engine_arguments(args))
    except ValueError as error:  # vLLM's and the plugin's word for a setting that cannot be
        raise JobError(str(error)) from error
    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeRemainingColumn())
    # Opened anew after the engine: its processes must not inherit the lock and outlive this one.
    with output_file(args.output) as file, Progress(*columns, console=console) as bar:
        todo = remaining(prompts, file, args.output)
        task = bar.add_task("", total=len(prompts), completed=len(prompts) - len(todo))
        for begin in range(0, len(todo), args.batch_size):
            batch = todo[begin : begin + args.batch_size]
            append_answers(file, answer_batch(llm, sampling, batch))
            bar.advance(task, len(batch))


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise argparse.ArgumentTypeError(f"not JSON ({problem.msg})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def budget(text: str) -> int | float:
    """Tokens, or a ratio; what is sensible is the engine's to say."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub's identifier")
    parser.add_argument("--input", type=Path, required=True, help="prompts, JSONL")
    parser.add_argument("--output", type=Path, required=True, help="answers, JSONL")
    parser.add_argument("--kv-compression", metavar="METHOD")
    parser.add_argument("--kv-compression-budget", type=budget, metavar="N")
    parser.add_argument("--kv-compression-config", type=json_object, metavar="JSON")
    parser.add_argument("--max-tokens", type=positive, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="prompts between two writes (default: 32)"
    )
    parser.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, e.g. '{\"max_model_len\": 8192}'",
    )
    args = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        work(args)
    except (JobError, OSError) as error:
        sys.exit(f"batch_inference: {error}")


if __name__ == "__main__":
    main()

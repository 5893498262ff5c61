#!/usr/bin/env python3
"""Answer the prompts of a JSONL file, with or without KV-cache compression.

Input: one object a line with "prompt" (a text to continue) or "messages" (a chat), and "id"
(the number of the line if there is none). Output: one object a line with "id", "answer",
"prompt_tokens", "output_tokens" and "finish_reason"; a prompt that vLLM refuses gets a null answer
and "error". Run the same command again after a kill and it goes on where it was.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jsonl_jobs import JobPrompt, append_answers, output_file, read_prompts, remaining
from vllm_kvcompress.tools.arguments import CommandError, count, json_object

Answer = dict[str, Any]


def describe(prompt: JobPrompt, output: Any) -> Answer:
    """Return the line of the output for one of vLLM's outputs."""
    completion = output.outputs[0]
    return {
        "id": prompt.id,
        "answer": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def run_batch(llm: Any, sampling: Any, batch: list[JobPrompt]) -> list[Answer]:
    """Return the answers to all of the batch; ValueError if vLLM refuses one of its prompts."""
    texts = [prompt for prompt in batch if prompt.prompt is not None]
    chats = [prompt for prompt in batch if prompt.messages is not None]
    outputs: list[Any] = []
    if texts:
        outputs += llm.generate([p.prompt for p in texts], sampling, use_tqdm=False)
    if chats:
        outputs += llm.chat([p.messages for p in chats], sampling, use_tqdm=False)
    return [describe(prompt, output) for prompt, output in zip(texts + chats, outputs, strict=True)]


def answer_batch(llm: Any, sampling: Any, batch: list[JobPrompt]) -> list[Answer]:
    """Return the answers to all of the batch, even if vLLM refuses one of its prompts."""
    try:
        return run_batch(llm, sampling, batch)
    except ValueError as error:
        if len(batch) > 1:
            return [a for prompt in batch for a in answer_batch(llm, sampling, [prompt])]
        refused = {"answer": None, "prompt_tokens": None, "output_tokens": 0}
        return [{"id": batch[0].id, **refused, "finish_reason": "error", "error": str(error)}]


def start_engine(args: argparse.Namespace) -> Any:
    """Start the engine.

    Raises:
        CommandError: vLLM or the plugin refuses a setting.

    """
    # Imported here: vLLM takes seconds, which --help and a mistake in a file need not wait for.
    from vllm_kvcompress import LLM
    from vllm_kvcompress.planning.config import parse_budget

    budget = args.kv_compression_budget
    try:
        chosen = {
            "kv_compression": args.kv_compression,
            "kv_compression_budget": None if budget is None else parse_budget(budget),
            "kv_compression_config": args.kv_compression_config,
        }
        return LLM(model=args.model, **{**chosen, **args.engine_args})
    except ValueError as error:
        raise CommandError(str(error)) from error


def work(args: argparse.Namespace) -> None:
    """Answer the prompts that have no answer yet.

    Raises:
        CommandError: A file or a setting is wrong.

    """
    prompts = read_prompts(args.input)
    with output_file(args.output) as file:  # what is wrong here shows before the engine starts
        todo = remaining(prompts, file, args.output)
    done = len(prompts) - len(todo)
    print(f"{len(prompts)} prompts, {done} answered already", file=sys.stderr)
    if not todo:
        return

    llm = start_engine(args)
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    # Opened again after the engine: its processes must not inherit the lock and outlive this one.
    with output_file(args.output) as file:
        todo = remaining(prompts, file, args.output)
        with tqdm(total=len(prompts), initial=len(prompts) - len(todo), unit="prompt") as bar:
            for begin in range(0, len(todo), args.batch_size):
                batch = todo[begin : begin + args.batch_size]
                append_answers(file, answer_batch(llm, sampling, batch))
                bar.update(len(batch))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub's identifier")
    parser.add_argument("--input", type=Path, required=True, help="prompts, JSONL")
    parser.add_argument("--output", type=Path, required=True, help="answers, JSONL")
    parser.add_argument("--kv-compression", metavar="METHOD")
    parser.add_argument("--kv-compression-budget", metavar="N")
    parser.add_argument("--kv-compression-config", type=json_object, metavar="JSON")
    parser.add_argument("--max-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--batch-size", type=count, default=32, help="prompts between two writes (default: 32)"
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
    except (CommandError, OSError) as error:
        sys.exit(f"batch_inference: {error}")


if __name__ == "__main__":
    main()

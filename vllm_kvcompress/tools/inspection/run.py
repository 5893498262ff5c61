"""The part of ``kvcompress inspect`` that runs the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.request_settings import METHOD_KEY, PARAMS_KEY
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.engine_arguments import (
    check_engine_arguments,
    llm_arguments,
    user_errors,
)
from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Run
from vllm_kvcompress.tools.kv_space import check_kv_space
from vllm_kvcompress.tools.plan.model import ServedModel, read_model

if TYPE_CHECKING:
    from vllm_kvcompress.planning.config import KVCompressionConfig

ENVIRONMENT = {
    # Records come back as they are, and the engine starts sooner.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables for vLLM, set where the user's environment does not set them."""


@dataclass(frozen=True)
class InspectionJob:
    """A prompt and the methods to run it with.

    Attributes:
        model: The model's folder.
        text: The document.
        question: Question that is put after the text; may be empty.
        chat: Whether to use the model's chat template.
        configs: Settings for each method, in the order they are drawn; all have one budget.
        block_size: Tokens of a block.
        dtype: Data type of the model, as vLLM takes it.
        max_model_len: Tokens; None: as many as the prompt needs.
        engine_args: Further keyword arguments for vLLM.

    """

    model: Path
    text: str
    question: str
    chat: bool
    configs: tuple[KVCompressionConfig, ...]
    block_size: int
    dtype: str
    max_model_len: int | None
    engine_args: Mapping[str, Any]


def inspect(job: InspectionJob) -> Inspection:
    """Run the prompt once for each method, in one engine.

    Changes the process's environment variables (:data:`ENVIRONMENT`) where they are not set.

    Raises:
        CommandError: The prompt is kept whole, or vLLM refuses a setting.

    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    model, _ = read_model(str(job.model), job.dtype)
    token_ids, pieces = read_prompt(job)
    length = check_length(job, model, len(token_ids))
    with user_errors():
        llm = start(job, model, length)
    llm.collective_rpc("kv_compression_record", args=(True,))
    runs = [
        record(llm, token_ids, config, first=config is job.configs[0]) for config in job.configs
    ]
    return Inspection(
        model=job.model.absolute().name,
        budget=job.configs[0].budget,
        token_ids=np.array(token_ids, dtype=np.int64),
        pieces=pieces,
        runs=tuple(runs),
        question=job.question,
        layers=model.compressed,
    )


def read_prompt(job: InspectionJob) -> tuple[list[int], tuple[str, ...]]:
    """Return the token ids of the document with its question, and the text of each.

    Raises:
        CommandError: The model has no tokenizer here, or no chat template.

    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model: {job.model} has no usable tokenizer") from error
    text = f"{job.text.rstrip()}\n\n{job.question}" if job.question else job.text
    if job.chat:
        if not tokenizer.chat_template:
            raise CommandError(f"--chat: the model in {job.model} has no chat template")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    # A chat template writes the special tokens itself.
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, add_special_tokens=not job.chat)["input_ids"])
        return ids, tuple(tokenizer.decode([token]) for token in ids)
    encoded = tokenizer(text, add_special_tokens=not job.chat, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    names = tokenizer.convert_ids_to_tokens(ids)
    return ids, tuple(split_text(text, encoded["offset_mapping"], names))


def split_text(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """One string a token; together they give the text again.

    Characters that no token covers (spaces that a tokenizer drops) go with the token that follows,
    those at the end with the last. A character of several tokens goes with the first of them; the
    others are empty. A token that stands for no text, such as a beginning of sequence that the
    tokenizer adds, shows its name.

    Args:
        text: Text that was tokenized.
        offsets: Begin and end in ``text``, in characters, of every token.
        names: The vocabulary's name of every token.

    """
    pieces: list[str] = []
    position = 0
    for (begin, end), name in zip(offsets, names, strict=True):
        if begin == end:
            pieces.append(name)
            continue
        pieces.append(text[position:end])
        position = max(position, end)
    if pieces and position < len(text):
        pieces[-1] += text[position:]
    return pieces


def check_length(job: InspectionJob, model: ServedModel, tokens: int) -> int:
    """Return the context to start the engine with.

    Raises:
        CommandError: A method keeps the prompt whole, or it is longer than the context.

    """
    for config in job.configs:
        if BlockPlanner(config, job.block_size).schedule(tokens) is None:
            raise CommandError(
                f"a prompt of {tokens} tokens fits --budget {config.budget} and is kept whole; "
                "lower the budget or take a longer text"
            )
    needed = tokens + 1
    if model.max_model_len is not None and needed > model.max_model_len:
        raise CommandError(
            f"a prompt of {tokens} tokens is too long for the model's {model.max_model_len}; take "
            "a shorter text"
        )
    if job.max_model_len is None:
        return needed
    if job.max_model_len < needed:
        raise CommandError(
            f"--max-model-len must be at least {needed} for a prompt of {tokens} tokens, got "
            f"{job.max_model_len}"
        )
    return job.max_model_len


def cache_bytes(job: InspectionJob, model: ServedModel, max_model_len: int) -> int:
    """Memory for the cache of one prompt; without being told vLLM takes most of the machine's."""
    whole = cdiv(max_model_len, job.block_size)
    # A prompt holds its own blocks and those that it is compressed into, which are fewer; of each
    # group of sliding-window layers vLLM wants one more at most.
    blocks = 2 * whole + 8 + model.groups.window_groups * (whole + 1)
    return blocks * model.block_bytes(job.block_size)


def start(job: InspectionJob, model: ServedModel, max_model_len: int) -> Any:
    """Start an engine with the first method whose requests may ask for the others.

    Raises:
        CommandError: vLLM has no such argument, or a variable overrules the size of the KV cache.
        ValueError: vLLM or the plugin refuses a setting.

    """
    from vllm_kvcompress import LLM

    check_engine_arguments(job.engine_args)
    check_kv_space("the size of the KV cache that kvcompress inspect takes")
    first, *others = job.configs
    allowed = {"method": [config.method for config in others], "params": True}
    return LLM(
        **{
            "model": str(job.model),
            **llm_arguments(first, **({"allow": allowed} if others else {})),
            "block_size": job.block_size,
            "max_model_len": max_model_len,
            "dtype": job.dtype,
            "enforce_eager": True,
            "max_num_seqs": 1,
            "kv_cache_memory_bytes": cache_bytes(job, model, max_model_len),
            **job.engine_args,
        }
    )


def record(llm: Any, token_ids: list[int], config: KVCompressionConfig, *, first: bool) -> Run:
    """Run the prompt with one method.

    Args:
        llm: A ``vllm_kvcompress.LLM`` that records.
        token_ids: The prompt.
        config: The method and its parameters.
        first: Whether they are the engine's own.

    Raises:
        CommandError: vLLM refuses the request.
        RuntimeError: The engine recorded no cut although one was planned.

    """
    from vllm import SamplingParams

    asked = {METHOD_KEY: config.method, PARAMS_KEY: dict(config.params)}
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, detokenize=False, extra_args=None if first else asked
    )
    with user_errors():
        llm.generate({"prompt_token_ids": token_ids}, sampling, use_tqdm=False)
    ranks = [records[-1] for records in llm.collective_rpc("kv_compression_records") if records]
    if not ranks:
        raise RuntimeError(f"{config.method}: the engine recorded nothing of a planned cut")
    return Run.of(ranks)

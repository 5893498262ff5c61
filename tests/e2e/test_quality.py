"""Answers from a compressed cache: RULER niah_single_2, 20 prompts of 1024 tokens, greedy.

Sixty prompts, three draws of twenty, because one draw says little: at 12.5 % they give 16, 19 and
19 (benchmarks/results/quality_niah_single_2.csv), 54 of 60 being 18 of 20. On the draw with 16 a
token-granular Hugging Face computation with CAKE's scores gets 16 as well and misses the very same
prompts. The bounds leave two prompts in sixty to the rounding of other processors.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.tools.evaluation.tasks.haystack import Needle, match, niah_single_2

pytestmark = pytest.mark.engine

REPO = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("KVC_TEST_MODELS", REPO / "models")) / "qwen2.5-coder-0.5b-instruct"
RULER = REPO / "models" / "ruler"

LENGTH = 1024
SEEDS = (42, 0, 1)  # RULER's own, and the two that anybody would try next
COUNT = 60
# RULER allows 128 tokens; the answer is eight, and stopping early can only lose a right one.
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def needles() -> list[Needle]:
    """The prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    made = [
        needle
        for seed in SEEDS
        for needle in niah_single_2(
            RULER, count_tokens, length=LENGTH, count=COUNT // len(SEEDS), seed=seed
        )
    ]
    assert all(LENGTH - 8 <= n.num_tokens <= LENGTH for n in made)
    return made


@pytest.mark.parametrize(
    ("budget", "blocks", "least"),
    [(None, None, 58), (0.25, 8, 57), (0.125, 4, 52)],
    ids=["full", "25%", "12.5%"],
)
def test_needle(
    needles: list[Needle], budget: float | None, blocks: int | None, least: int
) -> None:
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    compression: dict[str, Any] = {}
    if budget is not None:
        compression = {"kv_compression": "cake", "kv_compression_budget": budget}
    llm = LLM(
        str(MODEL),
        dtype="bfloat16",
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        max_num_seqs=20,
        kv_cache_memory_bytes=512 << 20,
        **compression,
    )
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
        outputs = llm.generate([n.prompt for n in needles], sampling, use_tqdm=False)
        if blocks is not None:  # it is the compressed cache that answers, of the promised size
            (stats,) = llm.collective_rpc("kv_compression_stats")
            assert stats["prompt_cuts"] == COUNT
            core = llm.llm_engine.engine_core.engine_core
            plan = core.scheduler._resolver.default_planner.plan(LENGTH)
            assert plan.arena_blocks == blocks
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    answers = [output.outputs[0].text for output in outputs]
    wrong = {
        i: (answer, needle.answers)
        for i, (answer, needle) in enumerate(zip(answers, needles, strict=True))
        if match(answer, needle.answers) < 1.0
    }
    assert COUNT - len(wrong) >= least, wrong

"""Answers from a compressed cache: RULER niah_single_2, prompts of 1024 tokens, greedy.

With --all sixty prompts, three draws of twenty, because one draw says little: at 12.5 % they give
16, 19 and 19 (benchmarks/results/quality_niah_single_2.csv), 54 of 60 being 18 of 20. On the draw
with 16 a token-granular Hugging Face computation with CAKE's scores gets 16 as well and misses the
very same prompts. The bounds leave two prompts in sixty, one or two in twenty, to the rounding of
other processors.
"""

from __future__ import annotations

import pytest

from tests.e2e.engine import Engine, greedy, setting
from tests.e2e.harness import MODELS, QUALITY, REPO, Engines
from vllm_kvcompress.tools.evaluation.metrics import match_all
from vllm_kvcompress.tools.evaluation.task import Prompt
from vllm_kvcompress.tools.evaluation.tasks.needle import niah_single_2

pytestmark = pytest.mark.engine

RULER = REPO / "models" / "ruler"

LENGTH, DRAW = 1024, 20
# RULER allows 128 tokens; the answer is eight, and stopping early can only lose a right one.
NEW_TOKENS = 32


@pytest.fixture
def engine(engines: Engines) -> Engine:
    """As people serve it; requests may take less than a quarter."""
    return engines.get(
        "cake",
        0.25,
        model=QUALITY,
        dtype="bfloat16",
        max_num_seqs=DRAW,
        kv_cache_memory_bytes=512 << 20,
    )


def needles(seeds: tuple[int, ...]) -> list[Prompt]:
    """A draw of prompts per seed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / QUALITY)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    made = [
        needle
        for seed in seeds
        for needle in niah_single_2(RULER, count_tokens, length=LENGTH, count=DRAW, seed=seed)
    ]
    assert all(LENGTH - 8 <= count_tokens(n.text) <= LENGTH for n in made)
    return made


@pytest.mark.parametrize(
    ("seeds", "least"),
    [
        ((0,), {None: 19, 0.25: 19, 0.125: 17}),
        # RULER's own, and the two that anybody would try next.
        pytest.param((42, 0, 1), {None: 58, 0.25: 57, 0.125: 52}, marks=pytest.mark.slow),
    ],
    ids=["20 prompts", "60 prompts"],
)
def test_needle(engine: Engine, seeds: tuple[int, ...], least: dict[float | None, int]) -> None:
    asked = needles(seeds)
    # The full cache first: the others find most of their prompts in the prefix cache.
    for budget, least_right in least.items():
        kept = engine.record_kept()
        own = setting("none") if budget is None else setting(budget=budget)
        outputs = engine.llm.generate(
            [needle.text for needle in asked],
            greedy(NEW_TOKENS, ignore_eos=False, **own),
            use_tqdm=False,
        )
        # It is the compressed cache that answers, of the size that was asked for.
        assert len(kept) == (0 if budget is None else len(asked))
        assert all(
            sum(len(layer[0]) for layer in layers) == len(layers) * LENGTH * (budget or 1)
            for layers in kept
        )
        answers = [output.outputs[0].text for output in outputs]
        wrong = {
            i: (answer, needle.references)
            for i, (answer, needle) in enumerate(zip(answers, asked, strict=True))
            if match_all(answer, needle.references) < 1.0
        }
        assert len(asked) - len(wrong) >= least_right, (budget, wrong)

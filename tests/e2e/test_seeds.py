"""Answers drawn with a seed: one draw for each token that is taken, however often it is replayed.

Steps end at cuts, so a replay has rows whose sample is thrown away where plain vLLM has none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.e2e.engine import Engine, greedy, setting
from tests.e2e.harness import Engines
from tests.e2e.test_streaming import streaming

pytestmark = pytest.mark.engine

BUDGET = 128
TOKENS = 72
PATHS: dict[str, Callable[[Engines], Engine]] = {
    "full": lambda engines: engines.open(config={"prefill": "full"}),
    "cascade": lambda engines: engines.open(config={"prefill": "cascade"}),
    "chunked": lambda engines: engines.get("cake", 256, max_num_batched_tokens=160),
    "streaming": streaming,
    "decode cuts": lambda engines: engines.limited(),
}
ALIKE = ("full", "cascade", "chunked")
"""Paths that keep the same tokens."""


def drawn(
    engine: Engine, prompts: Sequence[Sequence[int]], preempt_after: Sequence[int] = ()
) -> list[list[list[int]]]:
    """Tokens of two answers to each prompt; after some steps all that runs is preempted."""
    # Not imported with the module: the kernels' tests arrange for Triton's interpreter first.
    from vllm.sampling_params import RequestOutputKind

    add, done = engine.llm.llm_engine.add_request, {}
    common: dict[str, Any] = {
        "temperature": 1.0,
        "n": 2,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    for number, prompt in enumerate(prompts):
        params = greedy(TOKENS, seed=11 + number, **common, **setting("cake", BUDGET))
        add(f"drawn-{number}", {"prompt_token_ids": list(prompt)}, params)
    for step, outputs in enumerate(engine.steps(), start=1):
        done.update({o.request_id: [list(c.token_ids) for c in o.outputs] for o in outputs})
        if step in preempt_after:
            for request in list(engine.scheduler.running):
                engine.preempt(request.request_id)
    return [done[f"drawn-{number}"] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def without() -> dict[str, Any]:
    """What paths draw without a preemption."""
    return {}


@pytest.mark.parametrize("path", PATHS)
def test_a_preempted_answer_goes_on_with_its_own_draws(
    engines: Engines, prose: list[int], without: dict[str, Any], path: str
) -> None:
    engine, prompts = PATHS[path](engines), [prose[:400], prose[500:560], prose[700:1000]]
    whole = drawn(engine, prompts)
    assert all(len(answer) == TOKENS for answers in whole for answer in answers)
    assert len({tuple(answer) for answers in whole for answer in answers}) == 2 * len(prompts)
    assert engine.llm.reset_prefix_cache()
    before, preempted = engine.stats["prompt_cuts"], engine.count_preemptions()
    # While some prompts are read, soon after, and when all have been cut more than once.
    assert drawn(engine, prompts, preempt_after=(2, 9, 60)) == whole
    assert preempted() > 6
    assert engine.stats["prompt_cuts"] > 2 * before
    if path in ALIKE:
        without[path] = whole
        assert all(answers == whole for answers in without.values())

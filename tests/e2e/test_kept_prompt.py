"""A prompt that fits the decode budget is there at the end of a long answer."""

from typing import Any

import pytest

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import ALL, Engines

pytestmark = pytest.mark.engine

PROMPT, LEFT, TOKENS, BUFFER = 164, 256, 320, 64
CUTS = (PROMPT + TOKENS - 1 - LEFT) // BUFFER
METHODS = ["cake", "dynamickv", "snapkv", "pyramidkv", "h2o", "tova", "streamingllm", "random"]
OFF: dict[str, Any] = {"extra_args": {"kv_compression_decode_keep_prompt": False}}


@pytest.fixture
def engine(engines: Engines) -> Engine:
    config = {"decode_budget": LEFT, "decode_buffer": BUFFER, "allow": ALL}
    return engines.get("cake", LEFT, config=config)


def shares(kept: list[list[list[list[int]]]], tokens: int) -> list[float]:
    """Per cut the share of the first tokens that is kept, on average over layers and heads."""
    heads = [[head for layer in cut for head in layer] for cut in kept]
    return [sum(t < tokens for head in cut for t in head) / tokens / len(cut) for cut in heads]


@pytest.mark.parametrize("method", METHODS)
def test_every_cut_keeps_the_whole_prompt(engine: Engine, prose: list[int], method: str) -> None:
    kept = engine.record_kept()
    engine.generate([prose[:PROMPT]], TOKENS, **setting(method))
    assert shares(kept, PROMPT) == [1.0] * CUTS


def test_what_does_not_fit_competes(engine: Engine, prose: list[int]) -> None:
    """A prompt that leaves less than a quarter, one that did not fit, and one that asks for it."""
    for prompt, own in ((prose[:193], {}), (prose[:400], {}), (prose[:PROMPT], OFF)):
        kept = engine.record_kept()
        engine.generate([prompt], TOKENS, **own)
        cuts = kept[-2:]
        assert len(cuts) == 2
        assert max(shares(cuts, min(len(prompt), LEFT))) < 1.0


def test_the_rest_of_a_compressed_prompt_is_kept(engine: Engine, prose: list[int]) -> None:
    """All that its own cut has left, a different number per layer; a preemption changes nothing."""
    prompt, own = prose[:400], setting("cake", 128)
    kept = engine.record_kept()
    expected = engine.generate([prompt], TOKENS, **own)
    left = [len(layer[0]) for layer in kept[0]]
    assert len(set(left)) > 1
    assert len(kept) == 1 + (TOKENS - 1 - (LEFT - 128)) // BUFFER
    for cut in kept[1:]:
        for count, layer in zip(left, cut, strict=True):
            assert all(set(range(count)) <= set(head) for head in layer)
    before, request_id = engine.stats["prompt_cuts"], engine.add(prompt, TOKENS, **own)
    done = []
    for step, outputs in enumerate(engine.steps(), start=1):
        done += [list(o.outputs[0].token_ids) for o in outputs if o.finished]
        if step in (100, 250):
            engine.preempt(request_id)
    assert done == expected
    assert engine.stats["prompt_cuts"] == before + 3

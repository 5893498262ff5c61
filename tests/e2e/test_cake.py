"""CAKE on a real engine: the reserved blocks, different layers, and nothing of anybody else's."""

from typing import Any

import pytest
import torch

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import LAYERS, Engines

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 256
R = BUDGET // BLOCK


def test_holds_the_promised_blocks(engines: Engines, prose: list[int]) -> None:
    """Prompt blocks while it runs, R after it, one more per block of new tokens; rest is free."""
    engine = engines.open()
    prompt = prose[:1000]
    n = -(-len(prompt) // BLOCK)
    before = engine.free_blocks()
    request_id = engine.add(prompt, 40)
    held, pages = [], None
    for _ in engine.steps():
        if request_id in engine.manager.req_to_blocks:
            blocks = engine.blocks_of(request_id)
            assert engine.free_blocks() == before - len(blocks)
            held.append(len(blocks))
        if request_id in engine.arena and pages is None:
            pages = engine.arena.used[:, engine.arena.slot(request_id)].copy()
    # The step that ends the prefill holds both; then R, plus a block from the first new token on,
    # and another from the 33rd on.
    assert held[0] == n + R
    assert held[1:33] == [R + 1] * 32
    assert set(held[33:]) == {R + 2}
    assert pages is not None
    assert pages.sum() == R * len(pages), "the budget is spent exactly"
    assert len(set(pages.tolist())) > 3, "layers differ"
    assert pages.min() >= 1
    assert engine.free_blocks() == before


def test_layers_keep_what_their_tables_say(engines: Engines, prose: list[int]) -> None:
    """Arena pages hold exactly the prompt's own keys of the kept tokens, window last."""
    engine = engines.open()
    codec, seen = engine.codec, []
    window = engine.planner.window
    move = codec.move

    def spy(sources: Any, kept: Any, targets: Any) -> None:
        move(sources, kept, targets)
        for source, tokens, target in zip(sources, kept, targets, strict=True):
            whole = codec.read_keys(source, 777)
            moved = codec.read_keys(target, tokens.shape[1])
            index = tokens.unsqueeze(-1).expand(-1, -1, whole.shape[-1])
            assert torch.equal(moved, whole.gather(1, index))
            assert torch.equal(tokens[0, -window:], torch.arange(777)[-window:])
            assert all(len(set(row.tolist())) == tokens.shape[1] for row in tokens)
            seen.append(tokens.shape[1])

    codec.move = spy
    try:
        engine.generate([prose[:777]], 4)
    finally:
        codec.move = move
    assert len(seen) == LAYERS
    assert sum(seen) == LAYERS * BUDGET


def test_tokens_are_sampled_before_a_cut(
    engines: Engines, prose: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's tokens are sampled before its cuts are made, and their report still goes with it."""
    engine = engines.open()
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    compressor, order = engine.session._compressor, []
    sample, cut = runner.sample_tokens, compressor.cut

    def sampling(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        order.append("sampled")
        return output

    def cutting(*args: Any) -> None:
        cut(*args)
        order.append("cut")

    monkeypatch.setattr(runner, "sample_tokens", sampling)
    monkeypatch.setattr(compressor, "cut", cutting)
    engine.generate([prose[:777], prose[:600]], 3)
    assert order.count("cut") == engine.stats["prompt_cuts"] == 2
    assert order.index("sampled") < order.index("cut")
    assert not engine.session.reporter.report, "it went with the step's output"


def test_second_question_hits_the_prefix_and_leaves_it_alone(
    engines: Engines, prose: list[int]
) -> None:
    engine = engines.open()
    document, first, second = prose[:960], prose[2000:2050], prose[3000:3050]
    request_id = engine.add(document + first, 8)
    for _ in engine.steps():
        if request_id in engine.arena:
            blocks = engine.worker_request(request_id).blocks[: len(document) // BLOCK]
            break
    written = engine.page_contents(blocks)
    engine.drain()
    assert torch.equal(engine.page_contents(blocks), written)
    answer, hits = engine.ask(document + second, 8)
    assert hits == len(document), "every full block of the document"
    assert torch.equal(engine.page_contents(blocks), written), "the first one's blocks are intact"
    engine.llm.reset_prefix_cache()
    alone = engine.generate([document + second], 8)
    assert answer == alone[0], "compressed for its own question"


@pytest.mark.parametrize("method", ["cake", "snapkv"])
def test_an_equal_prompt_keeps_equal_tokens(
    engines: Engines, prose: list[int], method: str
) -> None:
    """In fp32: cold in a batch, scored as it runs; then alone behind a hit, scored from pages."""
    engine = engines.open()
    prompts = [prose[at : at + length] for at, length in ((0, 500), (900, 613), (2000, 700))]
    kept = engine.record_kept()
    together = engine.generate(prompts, 8, **setting(method))
    for prompt, answer in zip(prompts, together, strict=True):
        found, hits = engine.ask(prompt, 8, **setting(method))
        assert hits >= 448
        assert found == answer
    assert kept[:3] == kept[3:]


@pytest.mark.parametrize("tail", [1, 5, 31])
def test_last_chunk_shorter_than_the_window(engines: Engines, prose: list[int], tail: int) -> None:
    """The window's queries come from two chunks; the result is that of one step."""
    whole = engines.open()
    chunked = engines.get("cake", BUDGET, max_num_batched_tokens=160)
    prompt = prose[100 : 100 + 5 * 160 + tail]
    pages = [_pages_of(engine, prompt) for engine in (whole, chunked)]
    assert pages[0] == pages[1]
    assert chunked.generate([prompt], 40) == whole.generate([prompt], 40)


@pytest.mark.parametrize("length", [1, 20, 33, BUDGET - 1, BUDGET])
def test_prompt_within_the_budget_is_left_alone(
    engines: Engines, prose: list[int], length: int
) -> None:
    """One token, shorter than the window, up to the budget: plain vLLM, not even our tables."""
    engine, plain = engines.open(), engines.get()
    assert engine.generate([prose[:length]], 40) == plain.generate([prose[:length]], 40)
    assert engine.stats["prompt_cuts"] == engine.stats["compressed_steps"] == 0
    assert engine.stats["plain_steps"] > 0


@pytest.mark.parametrize("method", ["cake", "dynamickv", "uniform", "random"])
def test_every_method_serves(engines: Engines, prose: list[int], method: str) -> None:
    engine = engines.open()
    outputs = engine.generate([prose[:700], prose[500:1100]], 40, **setting(method))
    assert [len(o) for o in outputs] == [40, 40]
    assert engine.stats["prompt_cuts"] == 2


def test_a_share_of_the_prompt(engines: Engines, prose: list[int]) -> None:
    engine = engines.get("cake", 0.25)
    assert sum(_pages_of(engine, prose[:1024])) == 8 * LAYERS
    assert sum(_pages_of(engine, prose[:512])) == 4 * LAYERS


def _pages_of(engine: Engine, prompt: list[int]) -> list[int]:
    """Pages per layer right after compression."""
    request_id = engine.add(prompt, 2)
    for _ in engine.steps():
        if request_id in engine.arena:
            pages = engine.arena.used[:, engine.arena.slot(request_id)].copy()
            break
    engine.drain()
    return [int(p) for p in pages]

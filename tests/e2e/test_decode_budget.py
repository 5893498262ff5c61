"""Generated tokens cut back: bounded blocks, the kept tokens intact, off for who does not want."""

from typing import Any

import pytest
import torch

from tests.e2e.engine import setting
from tests.e2e.harness import LAYERS, Engines, page_bytes
from tests.support.released_pipelines import ReleasedCake

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 128
BUFFER = 32
R = BUDGET // BLOCK


def unlimited(engines: Engines, prompt: list[int], max_tokens: int, method: str) -> list[int]:
    """The answer of an engine that never cuts while it generates."""
    (answer,) = engines.open().generate([prompt], max_tokens, **setting(method, BUDGET))
    return answer


@pytest.mark.parametrize(
    ("method", "length"), [("cake", 40), ("cake", 400), ("dynamickv", 40), ("random", 400)]
)
def test_a_long_generation_holds_bounded_blocks(
    engines: Engines, prose: list[int], method: str, length: int
) -> None:
    engine = engines.limited()
    (answer,), held = engine.run_counting([prose[:length]], 160, **setting(method))
    text = length + 160 - 1  # the last token is never computed
    first = max(length, BUDGET) + BUFFER
    cuts = (text - first) // BUFFER + 1
    assert engine.stats["decode_cuts"] == cuts
    # After the first cut: the arena, a buffer of growth, and nothing else.
    assert max(held[-(text - first) :]) <= R + BUFFER // BLOCK + 1
    assert held[-2] <= R + BUFFER // BLOCK
    # Up to the first cut nothing is different.
    same = first - length
    assert answer[:same] == unlimited(engines, prose[:length], 160, method)[:same]
    engine.check()


def test_a_cut_keeps_tokens_as_they_were_and_the_window_last(
    engines: Engines, prose: list[int]
) -> None:
    """Packed within the request's own pages, byte for byte what the kept tokens' slots held."""
    engine = engines.limited()
    codec, window = engine.codec, engine.planner.window
    rewrite, seen = codec.rewrite, []

    def spy(source: Any, kept: Any, target: Any) -> None:
        before = codec.gather(torch.as_tensor(source), kept)
        rewrite(source, kept, target)
        every = torch.arange(kept.shape[1]).expand(len(kept), -1)
        after = codec.gather(torch.as_tensor(target), every)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        held = len(target) * BLOCK + BUFFER
        assert torch.equal(kept[0, -window:], torch.arange(held)[-window:])
        assert set(target.tolist()) < set(source.tolist())
        seen.append(len(target))

    codec.rewrite = spy
    try:
        # CPU's move is a rewrite, too: only those of the decode cut are looked at.
        request_id = engine.add(prose[:400], BUFFER + 8)
        codec.rewrite = rewrite
        for _ in engine.steps():
            if request_id in engine.arena:
                codec.rewrite = spy
    finally:
        codec.rewrite = rewrite
    assert len(seen) == LAYERS
    assert sum(seen) == LAYERS * R


def test_requests_say_whether_they_want_it(engines: Engines, prose: list[int]) -> None:
    engine, off = engines.limited(), setting(decode=False)
    prompt = prose[:300]
    whole = unlimited(engines, prompt, 90, "cake")
    assert engine.generate([prompt], 90, **off) == [whole]
    assert engine.stats["decode_cuts"] == 0
    on = engine.generate([prompt], 90)
    # One of each kind in a batch.
    names = [engine.add(prompt, 90, **off), engine.add(prompt, 90)]
    done = engine.drain()
    assert [done[engine.caller_id[n]] for n in names] == [whole, *on]


def test_preempted_requests_are_cut_where_they_were_the_first_time(
    engines: Engines, prose: list[int]
) -> None:
    config = {"decode_budget": BUDGET, "decode_buffer": BUFFER, "reserve_tokens": 0}
    small = engines.get(
        "cake", BUDGET, config=config, max_model_len=1024, kv_cache_memory_bytes=20 * page_bytes()
    )
    large = engines.limited()
    prompts = [prose[31 * i : 31 * i + 20 + 60 * i] for i in range(6)]
    expected = large.generate(prompts, 330)
    preempted = small.count_preemptions()
    assert small.generate(prompts, 330) == expected
    assert preempted() > 0, "the pool was not small enough"
    # Some were preempted after they had been cut, so that cuts were made again.
    assert small.stats["decode_cuts"] > large.stats["decode_cuts"]
    small.check()


@pytest.mark.parametrize("wrong", ["no", 2, [False]])
def test_a_wrong_setting_is_the_requests_own_error(
    engines: Engines, prose: list[int], wrong: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = engines.limited()
    with pytest.raises(VLLMValidationError, match="kv_compression_decode must be true or false"):
        engine.generate([prose[:50]], 4, extra_args={"kv_compression_decode": wrong})
    engine.check()


def test_faithful_cake_evicts_as_the_release_does(
    engines: Engines, prose: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token out for each that comes in, by its query alone, pooled in storage order."""
    config = {"faithful": True, "decode_budget": BUDGET, "decode_buffer": 1}
    engine = engines.get("cake", BUDGET, config=config)
    window, checked = engine.planner.window, []

    def check(held: Any, dealt: Any, kept: list[torch.Tensor]) -> None:
        if dealt is None:  # the prompt's cut
            return
        for layer in (0, 2, LAYERS - 1):
            length, query = held.lengths[layer], held.windows[layer]
            keys = engine.codec.read_keys(held.pages[layer], length)
            assert length == dealt[layer] * BLOCK + 1
            assert query.shape[0] == 1
            released = ReleasedCake(window=window, capacity=BUDGET)
            before = torch.arange(length - 1).expand(1, len(keys), -1)
            budget = length - 1 - window
            after, _ = released.decode(before, budget, query, keys[None], keys[None], length - 1)
            assert torch.equal(kept[layer], after[0])
            checked.append(layer)

    engine.watch_cuts(monkeypatch, check)
    (answer,), blocks = engine.run_counting([prose[:400]], 12)
    assert len(answer) == 12
    assert len(checked) == 3 * 11
    # What each token is written to goes back with it.
    assert set(blocks[1:-1]) <= {R + 1, R + 2}

"""Generated tokens cut back: bounded blocks, the kept tokens intact, off for who does not want."""

from typing import Any

import pytest
import torch

from tests.e2e.harness import Engine, Engines
from tests.support.released_pipelines import ReleasedCake
from vllm_kvcompress.eviction.selection import select_survivors

pytestmark = pytest.mark.engine

BLOCK = 32
BUDGET = 128
BUFFER = 32
R = BUDGET // BLOCK
PAGE_BYTES = 30 * 3 * BLOCK * 128 * 4


def limited(engines: Engines, method: str = "cake", **settings: Any) -> Engine:
    config = {"decode_budget": BUDGET, "decode_buffer": BUFFER, "allow": {"decode": True}}
    return engines.get(method, BUDGET, config=config, **settings)


@pytest.mark.parametrize(
    ("method", "length"), [("cake", 40), ("cake", 400), ("dynamickv", 40), ("random", 400)]
)
def test_a_long_generation_holds_bounded_blocks(
    engines: Engines, prose: list[int], method: str, length: int
) -> None:
    engine, unlimited = limited(engines, method), engines.get(method, BUDGET)
    before = engine.stats["decode_cuts"]
    (answer,), held = engine.run_counting([prose[:length]], 160)
    text = length + 160 - 1  # the last token is never computed
    first = max(length, BUDGET) + BUFFER
    cuts = (text - first) // BUFFER + 1
    assert engine.stats["decode_cuts"] - before == cuts
    # After the first cut: the arena, a buffer of growth, and nothing else.
    assert max(held[-(text - first) :]) <= R + BUFFER // BLOCK + 1
    assert held[-2] <= R + BUFFER // BLOCK
    # Up to the first cut nothing is different.
    same = first - length
    assert answer[:same] == unlimited.generate([prose[:length]], 160)[0][:same]
    engine.check()


def test_a_cut_keeps_tokens_as_they_were_and_the_window_last(
    engines: Engines, prose: list[int]
) -> None:
    """Packed within the request's own pages, byte for byte what the kept tokens' slots held."""
    engine = limited(engines)
    session = engine.session
    codec, window = session._codec, session._resolver.default_planner.window
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
            if request_id in session.arena:
                codec.rewrite = spy
    finally:
        codec.rewrite = rewrite
    assert len(seen) == 30
    assert sum(seen) == 30 * R


def test_requests_say_whether_they_want_it(engines: Engines, prose: list[int]) -> None:
    engine, unlimited = limited(engines), engines.get("cake", BUDGET)
    prompt = prose[:300]
    before = engine.stats["decode_cuts"]
    off = {"extra_args": {"kv_compression_decode": False}}
    assert engine.generate([prompt], 90, **off) == unlimited.generate([prompt], 90)
    assert engine.stats["decode_cuts"] == before
    on = engine.generate([prompt], 90)
    # One of each kind in a batch.
    names = [engine.add(prompt, 90, extra_args=off["extra_args"]), engine.add(prompt, 90)]
    done = engine.drain()
    assert [done[engine.caller_id[n]] for n in names] == [*unlimited.generate([prompt], 90), *on]


def test_preempted_requests_are_cut_where_they_were_the_first_time(
    engines: Engines, prose: list[int]
) -> None:
    config = {"decode_budget": BUDGET, "decode_buffer": BUFFER, "reserve_tokens": 0}
    small = engines.get(
        "cake", BUDGET, config=config, max_model_len=1024, kv_cache_memory_bytes=20 * PAGE_BYTES
    )
    large = limited(engines, max_model_len=1024)
    prompts = [prose[31 * i : 31 * i + 20 + 60 * i] for i in range(6)]
    expected = large.generate(prompts, 330)
    before, preempted = small.stats["decode_cuts"], small.count_preemptions()
    assert small.generate(prompts, 330) == expected
    assert preempted() > 0, "the pool was not small enough"
    # Some were thrown out after they had been cut, so that cuts were made again.
    assert small.stats["decode_cuts"] - before > large.stats["decode_cuts"]
    small.check()


@pytest.mark.parametrize("wrong", ["no", 2, [False]])
def test_a_wrong_setting_is_the_requests_own_error(
    engines: Engines, prose: list[int], wrong: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = limited(engines)
    with pytest.raises(VLLMValidationError, match="kv_compression_decode must be true or false"):
        engine.generate([prose[:50]], 4, extra_args={"kv_compression_decode": wrong})
    engine.check()


def test_faithful_cake_evicts_as_the_release_does(
    engines: Engines, prose: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token out for each that comes in, by its query alone, pooled in storage order."""
    config = {"faithful": True, "decode_budget": BUDGET, "decode_buffer": 1}
    engine = engines.get("cake", BUDGET, config=config)
    compressor, method = engine.session._compressor, engine.session._resolver.default_planner.method
    find_held = compressor._held
    checked: list[int] = []
    held: Any = None

    def seeing(*args: Any) -> Any:
        nonlocal held
        held = find_held(*args)
        return held

    def checking(*args: Any, **kwargs: Any) -> Any:
        found = select_survivors(*args, **kwargs)
        if (dealt := kwargs["pages"]) is not None:
            for layer in (0, 7, 29):
                length, query = held.lengths[layer], held.windows[layer]
                keys = engine.session._codec.read_keys(held.pages[layer], length)
                assert length == dealt[layer] * BLOCK + 1
                assert query.shape[0] == 1
                released = ReleasedCake(window=method.window, capacity=BUDGET)
                before = torch.arange(length - 1).expand(1, len(keys), -1)
                budget = length - 1 - method.window
                after, _ = released.decode(
                    before, budget, query, keys[None], keys[None], length - 1
                )
                assert torch.equal(found.tokens[layer], after[0])
                checked.append(layer)
        return found

    compressor._held = seeing
    monkeypatch.setattr("vllm_kvcompress.eviction.compressor.select_survivors", checking)
    try:
        (answer,), blocks = engine.run_counting([prose[:400]], 12)
    finally:
        compressor._held = find_held
    assert len(answer) == 12
    assert len(checked) == 3 * 11
    # What each token is written to goes back with it.
    assert set(blocks[1:-1]) <= {R + 1, R + 2}

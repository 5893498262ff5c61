"""`scatter` keeps every token and only moves pages: token for token plain vLLM's output."""

from typing import Any

import pytest

from tests.e2e.harness import Engines

pytestmark = pytest.mark.engine

# On a block border, one off either way, shorter than a block, one token, longer than a chunk.
LENGTHS = (640, 64, 65, 63, 31, 1, 1000)


def _prompts(prose: list[int]) -> list[list[int]]:
    # Different starts: only where a test wants it do prompts share a prefix.
    return [prose[17 * i : 17 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
@pytest.mark.parametrize("chunk", [2048, 160], ids=["one-step", "chunked"])
def test_equals_plain(engines: Engines, prose: list[int], chunk: int, caching: bool) -> None:
    settings: dict[str, Any] = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    plain = engines.get(**settings)
    scatter = engines.get("scatter", **settings)
    prompts = _prompts(prose)
    expected = plain.generate(prompts, 200)
    assert scatter.generate(prompts, 200) == expected
    assert scatter.stats["prompt_cuts"] == len(prompts)


def test_equals_plain_when_the_prefix_is_cached(engines: Engines, prose: list[int]) -> None:
    plain, scatter = engines.get(), engines.get("scatter")
    prompts = [prose[:1000], prose[:700] + prose[900:1000], prose[:1000]]
    expected = plain.generate(prompts, 40)
    assert scatter.generate(prompts, 40) == expected
    _, hits = scatter.ask(prose[:1000], 1)
    assert hits == 992 - 32, "all full blocks but those of the observation window"
    assert scatter.generate(prompts, 40) == expected


def test_equals_plain_in_bf16(engines: Engines, prose: list[int]) -> None:
    """The dtype people serve in; with AMX its pages are stored in another order than fp32's."""
    prompts = _prompts(prose)
    expected = engines.get(dtype="bfloat16").generate(prompts, 60)
    assert engines.get("scatter", dtype="bfloat16").generate(prompts, 60) == expected


def test_pages_really_are_scattered(engines: Engines, prose: list[int]) -> None:
    engine = engines.get("scatter")
    request_id = engine.add(prose[:200], 8)
    seen = 0
    for _ in engine.steps():
        arena = engine.arena
        if request_id in arena:
            slot = arena.slot(request_id)
            blocks = engine.worker_request(request_id).private_blocks()[:7]
            own = arena.geometry.all_pages(blocks)
            moved = (arena.tables[:, slot, :7] != own).mean()
            assert moved > 0.5
            seen += 1
    assert seen > 0

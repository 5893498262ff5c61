"""Decode cuts keep a prompt, or what its own cut has left of it, wherever there is room for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.cut_world import BUDGET, SIZE, World
from vllm_kvcompress.eviction.layer_budgets import page_division
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.methods import LayerScores, available, get_method
from vllm_kvcompress.paging.rounding import cdiv

SHORT, LONG = 40, 130
LEFT = 112
"""Tokens that decode cuts leave: the least with room for a compressed prompt and two windows."""
CUTS = 3
METHODS = sorted(set(available()) - {"none", "scatter"})


def arrive(world: World, tokens: int, extra: dict[str, Any]) -> WorkerRequest:
    """A request at its first cut: at the prompt's end, or when a short one has generated."""
    settings = world.resolver.resolve(extra, tokens)
    schedule = settings.schedule(tokens)
    assert schedule is not None
    first = schedule.cut(1)
    blocks = world.blocks(cdiv(first.position, SIZE) + first.blocks)
    request = WorkerRequest(tokens, settings, schedule, blocks, 0, scheduled=first.position)
    request.window = world.window(request)
    return request


def go_on(world: World, name: str, request: WorkerRequest) -> None:
    """Let a request come to its next decode cut, with blocks for the survivors if they move."""
    assert request.schedule is not None
    new = world.blocks(request.schedule.tail_blocks(request.cuts_made))
    world.arena.grow({name: new})
    cut = request.next_cut
    assert cut is not None
    request.blocks += new + (world.blocks(cut.blocks) if cut.moves else [])
    request.window = world.window(request)


def run(method: str, together: bool, keep: bool) -> tuple[Any, list[list[bool]]]:
    """What is kept, and per request and decode cut whether all of the prompt's tokens are."""
    config = {"method": method, "decode_budget": LEFT, "decode_keep_prompt": keep}
    world = World("torch", config)
    extra = {"kv_compression_keep": [0, 3, 20, 24]}
    requests = {f"r{tokens}": arrive(world, tokens, extra) for tokens in (SHORT, LONG)}
    world.cut({"r130": requests["r130"]}, together)
    left = {"r40": [SHORT] * world.layers, "r130": world.arena.lengths("r130", LONG).tolist()}
    assert sum(left["r130"]) == BUDGET * world.layers
    go_on(world, "r130", requests["r130"])
    for _ in range(CUTS):
        world.cut(requests, together)
        for name, request in requests.items():
            go_on(world, name, request)
    records = world.reporter.records
    assert records is not None
    whole = [
        [
            all(set(range(count)) <= set(head) for count, kept in layers for head in kept.tolist())
            for record in records
            if record.request_id == name and record.number > (name == "r130")
            for layers in [list(zip(left[name], record.kept, strict=True))]
        ]
        for name in requests
    ]
    return [[layer.tolist() for layer in record.kept] for record in records], whole


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_it_at_every_cut(method: str) -> None:
    """In every layer and head, whether cuts share launches or not."""
    alone, whole = run(method, together=False, keep=True)
    assert whole == [[True] * CUTS] * 2
    found, whole = run(method, together=True, keep=True)
    assert whole == [[True] * CUTS] * 2
    assert sorted(found) == sorted(alone)


def test_without_it_a_prompt_competes_with_what_is_generated() -> None:
    _, whole = run("snapkv", together=False, keep=False)
    assert whole == [[False] * CUTS] * 2


def test_a_replay_finds_what_the_first_run_found() -> None:
    world = World("torch", {"method": "cake", "decode_budget": LEFT})
    request = arrive(world, SHORT, {})
    cut = request.next_cut
    assert cut is not None
    for _ in range(2):
        places = request.pinned_places(cut, [cut.position] * world.layers, 2)
        assert places is not None
        assert places.count == [SHORT] * world.layers
        request.advance()
        request.restart(request.blocks, None)


def test_layers_that_hold_more_get_room_for_it() -> None:
    """Whatever the weights; the pool is spent, and a floor of the method's own gives way."""
    method = get_method("dynamickv", {"window": 8, "min_tokens": 64})
    held = [16, 96, 32]
    division = page_division(
        method,
        num_layers=3,
        pages_per_layer=5,
        block_size=16,
        lengths=[tokens + 64 for tokens in held],
        pinned=held,
    )
    scores = [LayerScores(tokens) for tokens in np.zeros((3, 2, 8), np.float32)]  # type: ignore[arg-type]
    staged = division.staged(scores)
    weights = [np.asarray([1.0, 0.0, 1.0])[:seen] for seen in staged.stages]
    pages = division.divide_by(staged, weights)
    assert pages.sum() == 3 * 5
    assert all(pages * 16 >= np.asarray(held) + method.window)

"""Cuts that share launches keep what each keeps on its own, wherever a cut ends up in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress_kernels import selection, winners
from kvcompress_kernels.dispatch import Implementation
from tests.support.cut_world import HEADS, KV_HEADS, LAYERS, World, outcome
from vllm_kvcompress.eviction import shared_cuts
from vllm_kvcompress.methods import dynamickv, parts
from vllm_kvcompress.paging import strided_codec

PARAMS = {"dynamickv": {"every": 2, "kernel": 3}}


def run(
    implementation: Implementation,
    together: bool,
    methods: tuple[str, ...],
    lengths: tuple[int, ...] = (100, 133, 81, 161),
    layers: int = LAYERS,
) -> Any:
    """Cuts of prompts of several lengths, then decode cuts of them beside another prompt's."""
    world = World(implementation, {"method": methods[0]}, layers)
    requests = {}
    for number, tokens in enumerate(lengths):
        method = methods[number % len(methods)]
        config = PARAMS.get(method, {})
        extra: dict[str, Any] = {"kv_compression": method, "kv_compression_config": config}
        if number == 1:
            extra["kv_compression_keep"] = [0, 3, 40, 44]
        requests[f"{method}-{number}"] = world.request(tokens, extra)
    world.cut(requests, together)
    for _ in lengths[1:3]:
        for name, request in requests.items():
            world.generate(name, request)
        requests[f"late-{len(requests)}"] = world.request(90)
        world.cut(requests, together)
    return (*outcome(world, requests), world.cache)


@pytest.mark.parametrize(
    "methods",
    [("cake",), ("dynamickv",), ("snapkv", "cake", "dynamickv"), ("tova", "knorm", "streamingllm")],
    ids="+".join,
)
@pytest.mark.parametrize("memory", ["plenty", "little"])
def test_together_as_one_by_one(
    methods: tuple[str, ...], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: pages, tables, records, whatever fits in one launch."""
    alone = run("torch", False, methods)
    if memory == "little":  # for the statistics of one layer, or of some; for two requests' scores
        monkeypatch.setattr(strided_codec, "OBSERVED_BYTES", 2 * 4 * HEADS * 400)
        monkeypatch.setattr(shared_cuts, "SHARED_BYTES", 4 * KV_HEADS * LAYERS * 250)
    found = run("torch", True, methods)
    assert found[:-1] == alone[:-1]
    assert torch.equal(found[-1], alone[-1])


@pytest.mark.parametrize("method", ["cake", "dynamickv"])
def test_the_kernels_of_a_gpu_keep_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    sizes: Any = {"lengths": (100, 67), "layers": 3}
    expected = run("torch", False, (method,), **sizes)
    for module in (parts, selection, dynamickv, winners):
        monkeypatch.setattr(module, "use_triton", lambda tensor, wanted: wanted != "torch")
    found = run("triton", True, (method,), **sizes)
    assert found[:-1] == expected[:-1]
    assert torch.equal(found[-1], expected[-1])


def test_what_a_request_keeps_does_not_depend_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars included: a budget must not hang on what else ends in the step."""
    scoring_triton = pytest.importorskip("kvcompress_kernels.scoring_triton")
    for module in (parts, selection, dynamickv, winners):
        monkeypatch.setattr(module, "use_triton", lambda tensor, wanted: wanted != "torch")
    monkeypatch.setattr(scoring_triton, "_MIN_SHARE", 64)

    def stats(lengths: tuple[int, ...]) -> Any:
        world = World("triton", {"method": "cake"}, layers=2)
        requests = {f"r{n}": world.request(tokens) for n, tokens in enumerate(lengths)}
        world.cut(requests, True)
        assert world.reporter.records is not None
        return world.reporter.records[0].stats

    assert stats((90,)) == stats((90, 300))

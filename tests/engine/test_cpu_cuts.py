"""A prompt cut on the CPU's own pages, without an engine: the cascade ends as the full cut does."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_cpu_cut import MODELS, Prompt, Shape

SMALL = Shape(layers=6, heads=4, kv_heads=2, head_size=64)


def survivors(
    prompt: Prompt, kind: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, ...]]:
    """Keys and values of each layer after a cut, in the order in which attention reads them."""
    found: list[tuple[Tensor, ...]] = []
    admit = prompt.arena.admit

    def look(request_id: str, blocks: Any, pages: Any, **kwargs: Any) -> None:
        admit(request_id, blocks, pages, **kwargs)
        for own in pages:
            tokens = torch.arange(len(own) * 32).expand(SMALL.kv_heads, -1)
            found.append(prompt.codec.gather(torch.as_tensor(own), tokens))

    with monkeypatch.context() as patch:
        patch.setattr(prompt.arena, "admit", look)
        getattr(prompt, kind)()
    return found


@pytest.mark.parametrize("method", ["cake", "dynamickv", "snapkv"])
def test_a_cascade_leaves_what_a_cut_after_the_step_leaves(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "small", SMALL)
    prompt = Prompt(Namespace(model="small", tokens=900, budget=256, method=method))
    full, cascade = (survivors(prompt, kind, monkeypatch) for kind in ("full", "cascade"))
    assert len(full) == len(cascade) == SMALL.layers
    assert sum(len(keys[0]) for keys, _ in full) == SMALL.layers * 256
    for expected, layer in zip(full, cascade, strict=True):
        assert torch.equal(expected[0], layer[0])
        assert torch.equal(expected[1], layer[1])

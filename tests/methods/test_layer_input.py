"""What a method is given of a layer, and what becomes of what it returns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvcompress_kernels.scoring import window_statistics
from kvcompress_kernels.selection import top_tokens
from vllm_kvcompress.methods import Cake, LayerInput, LayerScores, to_numbers

FACTS: dict[str, Any] = {
    "layer": 0,
    "num_layers": 1,
    "num_tokens": 60,
    "num_kv_heads": 2,
    "base": 10,
}


def test_scalars_left_on_a_device_become_numbers_in_one_go() -> None:
    tokens = torch.zeros(1, 5)
    waiting = [
        LayerScores(tokens, {"log_entropy": torch.tensor(0.1 * i), "log_shift": -math.inf})
        for i in range(3)
    ]
    found = to_numbers(waiting)
    assert [type(s.stats["log_entropy"]) for s in found] == [float] * 3
    assert [s.stat("log_entropy") for s in found] == pytest.approx([0.0, 0.1, 0.2])
    assert all(s.stat("log_shift") == -math.inf for s in found)
    assert to_numbers(found) == found


def test_cake_takes_statistics_from_a_kernel_that_leaves_scalars_on_its_device() -> None:
    queries, keys = torch.randn(4, 8, 16), torch.randn(2, 60, 16)
    method = Cake(window=8)
    direct = method.score(LayerInput(**FACTS, queries=queries, keys=keys, scale=0.25))
    stats = window_statistics(queries, keys, window=8, scale=0.25)
    on_device = replace(
        stats,
        entropy=torch.tensor(stats.entropy, dtype=torch.float64),
        shift=torch.tensor(stats.shift, dtype=torch.float64),
    )
    observed = method.score(
        LayerInput(**FACTS, queries=queries, keys=None, scale=0.25, observe=lambda: on_device)
    )
    assert torch.equal(observed.tokens, direct.tokens)
    (numbers,) = to_numbers([observed])
    assert numbers.stats == pytest.approx(dict(direct.stats), rel=1e-12)


def test_keys_are_read_only_by_methods_that_need_them() -> None:
    queries, keys = torch.randn(4, 8, 16), torch.randn(2, 60, 16)
    read = []

    def read_keys() -> torch.Tensor:
        read.append(True)
        return keys

    entry = LayerInput(**FACTS, queries=queries, keys=None, scale=0.25, read_keys=read_keys)
    lazy = Cake(window=8, faithful=True).score(entry)
    eager = Cake(window=8, faithful=True).score(replace(entry, keys=keys))
    assert torch.equal(lazy.tokens, eager.tokens)
    assert read == [True]


def test_selecting_for_all_layers_is_selecting_for_each() -> None:
    scores = [LayerScores(torch.rand(2, 40)) for _ in range(3)]
    chosen = Cake().select_layers(scores, [7, 0, 40])
    for ids, score, count in zip(chosen, scores, [7, 0, 40], strict=True):
        assert torch.equal(ids, top_tokens(score.tokens, count))

"""What compositions say about their cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vllm_kvcompress.methods import Cake, Composed, LayerScores, Method, Tova, Uniform, get_method
from vllm_kvcompress.planning.block_planner import layers_between_cuts

COMPOSITIONS: dict[str, Method] = {
    "keydiff+cake": get_method("cake", {"window": 5, "scorer": "keydiff"}),
    "keydiff+cake-4": get_method("cake", {"window": 5, "scorer": "keydiff", "every": 4}),
    "tova+cake": get_method("tova", {"window": 5, "allocator": "cake"}),
    "snapkv+dynamickv": get_method(
        "snapkv", {"window": 5, "allocator": {"method": "dynamickv", "every": 2, "r_max": 1.5}}
    ),
    "random+dynamickv-floor": get_method(
        "dynamickv", {"window": 8, "scorer": "random", "min_tokens": 9}
    ),
    "cake+pyramidkv": get_method("cake", {"window": 5, "allocator": "pyramidkv"}),
    "streamingllm+uniform": get_method("streamingllm", {"window": 5, "allocator": "uniform"}),
    "pyramidkv": get_method("pyramidkv", {"window": 5, "beta": 3}),
    "tova": Tova(),
}
"""Compositions that tests/eviction/test_layerwise.py cuts as well."""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (COMPOSITIONS["keydiff+cake"], 1),
        (COMPOSITIONS["keydiff+cake-4"], 4),
        (COMPOSITIONS["snapkv+dynamickv"], 2),
        (COMPOSITIONS["cake+pyramidkv"], 1),
        (get_method("cake", {"scorer": "snapkv", "every": 0}), 10),
    ],
)
def test_layers_held_at_one_time_follow_the_allocator(method: Method, expected: int) -> None:
    assert layers_between_cuts(method, 10) == expected


def test_how_tokens_are_chosen_is_the_scorers_business() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Latest(Uniform):
        name: ClassVar[str] = "latest"

        @property
        def stores_by_worth(self) -> bool:
            return True

        def select(self, scores: LayerScores, count: int) -> Tensor:
            history = scores.tokens.shape[-1]
            return torch.arange(history - count, history).expand(len(scores.tokens), -1)

    method = Composed(window=8, scorer=Latest(window=8), allocator=Cake(window=8))
    assert not method.budgets_are_nested
    assert method.stores_by_worth
    assert method.select_layers([LayerScores(torch.rand(2, 20))], [3])[0].tolist() == (
        [[17, 18, 19]] * 2
    )
    assert layers_between_cuts(method, 10) == 10
    assert Composed(window=8, scorer=Cake(window=8), allocator=Latest(window=8)).budgets_are_nested

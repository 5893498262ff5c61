"""What compositions say about their cuts."""

import pytest
import torch
from torch import Tensor

from vllm_kvcompress.methods import Cake, LayerScores, Method, MethodSpec, Tova, get_method
from vllm_kvcompress.methods.uniform import UniformScorer
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


class LatestScorer(UniformScorer):
    """Chooses tokens in a way of its own, so a smaller budget need not be part of a larger."""

    stores_by_worth = True

    def select(self, tokens: Tensor, count: int) -> Tensor:
        history = tokens.shape[-1]
        return torch.arange(history - count, history).expand(len(tokens), -1)


def test_how_tokens_are_chosen_is_the_scorers_business() -> None:
    cake = Cake(window=8)
    method = Method("latest+cake", LatestScorer(window=8), cake.allocator)
    assert not method.scorer.budgets_are_nested
    assert method.scorer.stores_by_worth
    layers = [LayerScores(torch.rand(2, 20))] * 2
    chosen = [
        found.tolist() for found in method.scorer.select_layers([s.tokens for s in layers], [3, 5])
    ]
    assert chosen == [[list(range(20 - count, 20))] * 2 for count in (3, 5)]
    assert layers_between_cuts(method, 10) == 10
    latest = MethodSpec(name="latest", scorer=LatestScorer)(window=8)
    assert Method("cake+latest", cake.scorer, latest.allocator).scorer.budgets_are_nested

"""Winners at several stages at once are those of each stage on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.winners import Stage, out_of_background, winners_by_stage, winners_per_layer
from tests.kernels.test_selection import IMPLEMENTATIONS, run


def layers_of(count: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Of different sharpness and length, with ties, zeros and negative scores."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in range(count):
        scores = torch.rand(2, 60 + 7 * layer, generator=generator).pow(1 + layer % 4)
        scores[:, ::5] = scores[0, 3]
        scores[1, 1::9] = -0.25
        layers.append(scores.to(device))
    layers[1][0] = 0.0  # a row without a background
    return layers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("background", [None, 0.1, 0.75])
def test_stages_of_two_requests_as_one_by_one(
    device: torch.device, implementation: Implementation, background: float | None
) -> None:
    """Every layer counted in one go, also where nothing or everything wins."""
    layers = layers_of(7, device)
    stages = [Stage(0, 2, 40), Stage(0, 4, 80), Stage(0, 0, 0), Stage(4, 6, 0)]
    stages += [Stage(4, 6, 10**6), Stage(4, 7, 33), Stage(0, 4, 1)]
    found = run(
        winners_by_stage, layers, stages, background=background, implementation=implementation
    )
    for stage, counts in zip(stages, found, strict=True):
        own = layers[stage.first : stage.stop]
        if background is not None:
            own = [out_of_background(layer, background) for layer in own]
        expected = (
            winners_per_layer(own, stage.winners, implementation="torch")
            if own
            else np.zeros(0, dtype=np.int64)
        )
        assert counts.tolist() == expected.tolist()


def test_a_negative_number_of_winners_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        winners_by_stage([torch.zeros(1, 3)], [Stage(0, 1, -1)])

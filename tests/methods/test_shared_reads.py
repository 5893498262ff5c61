"""What several layers, or several divisions, compute together: once, and as if each were alone."""

from dataclasses import replace
from functools import partial

import torch

from benchmarks.count_cut_launches import LaunchCounter
from kvcompress_kernels.scoring import PagedStatistics
from kvcompress_kernels.winners import out_of_background
from tests.support.budgets import page_budgets
from tests.support.layers import score_random
from vllm_kvcompress.eviction.layer_budgets import page_division
from vllm_kvcompress.methods import (
    DynamicKV,
    LayerBatch,
    LayerInput,
    LayerScores,
    dynamickv,
    to_numbers,
    window_votes,
)
from vllm_kvcompress.methods.reads import window_scalars


def test_numbers_that_lie_side_by_side_are_fetched_as_they_lie(monkeypatch):
    """Entries of vectors, of which some are asked for twice or not at all, and scattered ones."""
    first, second, wide = torch.rand(4).double(), torch.rand(3), torch.rand(50)
    values = [first[2], second[0], first[0], first[2], second[1], wide[0], wide[40], first[3]]
    waiting = [LayerScores(torch.zeros(1, 5), {"value": value}) for value in values]
    stacked, stack = [], torch.stack

    def counted(given):
        stacked.append(len(given))
        return stack(given)

    monkeypatch.setattr(torch, "stack", counted)
    found = [s.stat("value") for s in to_numbers(waiting)]
    assert found == [float(value) for value in values]
    assert stacked == [2], "only the two that lie far apart"


def test_layers_observed_together_are_scored_together_and_apart():
    """One computation for all, but every caller gets numbers that nobody else can change."""
    jobs, heads, history = 3, 4, 20
    statistics = PagedStatistics(
        torch.rand(jobs, heads, history + 5),
        torch.rand(jobs, heads, history + 5),
        torch.rand(jobs).double(),
        torch.rand(jobs).double(),
        (history, history + 5, history),
        torch.tensor([history, history + 5, history], dtype=torch.int32),
    )
    batch = LayerBatch(statistics)
    for job, tokens in enumerate(statistics.history):
        layer = LayerInput(
            layer=job, num_layers=jobs, num_tokens=tokens + 8, window=8, num_kv_heads=2, base=4,
            queries=None, keys=None, scale=1.0,
            observe=partial(statistics.job, job), batch=batch, job=job,
        )  # fmt: skip
        alone = replace(layer, batch=None)
        votes = window_votes(layer, kernel=3, gamma=2.0, times=8)
        torch.testing.assert_close(votes, window_votes(alone, kernel=3, gamma=2.0, times=8))
        votes[:] = -1.0
        again = window_votes(layer, kernel=3, gamma=2.0, times=8)
        assert (again >= 0.0).all()
        assert window_scalars(layer) == window_scalars(alone)


def test_a_layer_is_compared_with_its_background_once(monkeypatch):
    """However many divisions look at it, in a one-shot cut and layer by layer."""
    method = DynamicKV(every=2, window=8)
    compared = []

    def counted(tokens, share):
        compared.append(tokens)
        return out_of_background(tokens, share)

    monkeypatch.setattr(dynamickv, "out_of_background", counted)
    sizes = {"pages_per_layer": 5, "block_size": 8, "lengths": 100}
    whole = page_budgets(method, score_random(method), **sizes)
    assert len(compared) == 6
    division = page_division(method, num_layers=6, **sizes)
    for scores in score_random(method):
        division.add(scores)
    assert len(compared) == 12
    assert division.held.tolist() == whole.tolist()


def test_stats_on_the_host_and_on_a_device_come_together() -> None:
    """As in a step that cuts a request of another package's method beside one of cake."""
    with LaunchCounter() as device:
        values = torch.empty(4, device="meta")
        scores = [LayerScores(torch.zeros(1, 1), {"x": value}) for value in values]
        scores.append(LayerScores(torch.zeros(1, 1), {"x": torch.tensor(2.5)}))
        found = to_numbers(scores)
    assert found[-1].stats == {"x": 2.5}
    assert len({s.stat("x") for s in found}) == 5
    assert device.found["sync"] == 1

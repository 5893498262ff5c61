"""The simulated releases show behaviour and bugs that no recorded output shows (test_golden.py)."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.budgets import token_budgets
from tests.support.layers import score_layers
from tests.support.released_pipelines import ReleasedCake, ReleasedDynamicKV
from vllm_kvcompress.methods import Cake, DynamicKV, LayerScores, Method
from vllm_kvcompress.methods.released_attention import window_attention
from vllm_kvcompress.methods.released_cake import adjust_budgets, layer_budgets, preference
from vllm_kvcompress.methods.released_dynamickv import layer_budgets as dynamic_budgets


def inputs(
    layers: int,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    window: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Queries [L, B, H, w, 16] and keys [L, B, N, S, 16] on a grid of sixteenths."""
    rng = np.random.default_rng(seed)
    width = rng.uniform(4, 40, size=(layers, 1, 1, 1, 1))

    def grid(*shape: int) -> Tensor:
        values = np.clip(np.rint(rng.standard_normal(shape) * width), -127, 127) / 16
        return torch.from_numpy(values).to(dtype)

    return grid(layers, batch, heads, window, 16), grid(layers, batch, kv_heads, tokens, 16)


def scores_of(method: Method, queries: Tensor, keys: Tensor, base: int) -> list[LayerScores]:
    return score_layers(method, queries[:, 0], keys[:, 0], base)


def history_kept(kept: list[Tensor], window: int = 8) -> list[int]:
    return [ids.shape[-1] - window for ids in kept]


# ------------------------------------------------------------------------------------------ CAKE


def test_cake_leaves_prompts_up_to_capacity_plus_window_alone_then_cuts_them():
    queries, keys = inputs(3, 48)
    pipeline = ReleasedCake(8, 40)
    run = pipeline.prefill(queries, keys)
    assert history_kept(run.kept) == [40] * 3
    assert run.stage_budget[-1].tolist() == [32] * 3
    grown = torch.cat((keys, keys[:, :, :, :1]), dim=3)
    ids, output = pipeline.decode(run.kept[0], 32, queries[0, :, :, 0], grown[0], grown[0], 48)
    assert ids.shape == (1, 2, 40)
    assert ids[0, 0, -8:].tolist() == list(range(41, 49))
    assert output.shape == (1, 4, 16)

    longer, more = inputs(3, 49)
    assert sum(history_kept(pipeline.prefill(longer, more).kept)) == 3 * 32


def test_cake_cascade_can_keep_less_than_one_shot_and_ours_does_not():
    queries, keys = inputs(8, 90, seed=24)
    cascade = ReleasedCake(8, 56).prefill(queries, keys)
    oneshot = ReleasedCake(8, 56, cascading=False).prefill(queries, keys)
    assert sum(history_kept(cascade.kept)) < sum(history_kept(oneshot.kept)) == 8 * 48
    found = []
    for every in (0, 1, 3):
        method = Cake(window=8, every=every)
        scores = scores_of(method, queries, keys, 48)
        found.append(token_budgets(method, scores, base=48, num_layers=8).tolist())
    assert found[0] == found[1] == found[2]


def test_cake_budgets_depend_on_the_rest_of_the_batch():
    queries, keys = inputs(6, 200, batch=2, seed=4)
    queries[:3, 1] *= 3
    both = ReleasedCake(8, 40).prefill(queries, keys)
    alone = ReleasedCake(8, 40).prefill(queries[:, :1], keys[:, :1])
    assert both.kept[0].shape[:2] == (2, 2)
    assert both.stage_budget[-1].tolist() != alone.stage_budget[-1].tolist()
    assert torch.equal(both.scores[:, :1], alone.scores)


def test_half_precision_flushes_a_preference_that_fp32_keeps():
    # Nearly flat attention: a tiny V, whose power 2.5 is below the smallest number of fp16.
    queries, keys = inputs(1, 256)
    attention = window_attention(queries[0] / 64, keys[0], scale=0.25)[..., :-8]
    wide = preference(attention, 1.6, 0.4)
    narrow = preference(attention.half(), 1.6, 0.4)
    assert wide.preference > 0.0
    assert narrow.preference == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_runs_through(dtype):
    queries, keys = inputs(4, 160, dtype=dtype)
    run = ReleasedCake(8, 40).prefill(queries, keys)
    assert run.scores.dtype == dtype
    assert sum(history_kept(run.kept)) == 128
    method = Cake(window=8, faithful=True)
    scores = scores_of(method, queries, keys, 32)
    assert torch.equal(torch.stack([s.tokens for s in scores]), run.scores[:, 0].float())
    assert method.weights(scores, base=32, num_layers=4).tolist() == run.stage_budget[-1].tolist()


def test_no_preference_at_all_is_an_error_in_the_release_and_an_even_split_here():
    with pytest.raises(ValueError, match="every layer's preference is zero"):
        layer_budgets([0.0, 0.0], 100, 200)
    flat = [LayerScores(torch.zeros(1, 200), {"preference": 0.0})] * 2
    assert Cake(faithful=True).weights(flat, base=50, num_layers=2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("shares", "pool", "history", "expected"),
    [
        ([5.9, 5.9], 11, 20, [6, 5]),
        ([30.0, 1.0], 31, 20, [20, 11]),
        ([9.0, 9.0, 1.0], 16, 20, [7, 8, 1]),
        ([1.0, 1.0], 1, 20, [1, 1]),
    ],
)
def test_budget_fix_up(shares, pool, history, expected):
    assert adjust_budgets(shares, pool, history) == expected


# ------------------------------------------------------------------------------------- DynamicKV


def test_dynamickv_never_cuts_layers_after_the_last_multiple_of_four():
    queries, keys = inputs(6, 400, seed=2)
    run = ReleasedDynamicKV(8, 40).prefill(queries, keys)
    kept = history_kept(run.kept)
    assert kept[4:] == [320, 320]
    assert sum(kept[:4]) == 6 * 32
    method = DynamicKV(window=8)
    ours = token_budgets(method, scores_of(method, queries, keys, 32), base=32, num_layers=6)
    assert ours.sum() == 6 * 32


@pytest.mark.parametrize(("layers", "tokens", "whole"), [(8, 40, True), (12, 45, False)])
def test_dynamickv_keeps_short_prompts_only_if_sizes_divide(layers, tokens, whole):
    queries, keys = inputs(layers, tokens, seed=3)
    run = ReleasedDynamicKV(8, 64).prefill(queries, keys)
    kept = history_kept(run.kept)
    assert (min(kept) == tokens - 8) is whole
    method = DynamicKV(window=8)
    scores = scores_of(method, queries, keys, 56)
    ours = token_budgets(method, scores, base=56, num_layers=layers)
    assert ours.tolist() == [tokens - 8] * layers


def test_dynamickv_gives_the_rounding_residue_to_the_last_layer():
    """Layers that differ by chance only: the release favours the last one, we do not."""
    base, layers = 56, 32
    released, ours = [], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.randn(4, 800, generator=generator).exp() for _ in range(layers)]
        per_batch = [layer[None] for layer in scores]
        released.append(dynamic_budgets(per_batch, base=base, r_max=10.0, num_layers=layers)[-1])
        seen = [LayerScores(layer) for layer in scores]
        ours.append(token_budgets(DynamicKV(), seen, base=base, num_layers=layers)[-1])
    assert np.mean(released) > 1.5 * base
    assert np.mean(ours) == pytest.approx(base, rel=0.15)


def test_dynamickv_budgets_without_any_winner_are_zero():
    scores = [torch.rand(1, 1, 50) for _ in range(4)]
    assert dynamic_budgets(scores, base=0, r_max=5.0, num_layers=4) == [0, 0, 0, 0]


def test_sinks_and_soft_cap_in_the_released_attention():
    queries, keys = inputs(1, 40)
    plain = window_attention(queries[0], keys[0], scale=0.25)
    sunk = window_attention(queries[0], keys[0], scale=0.25, sinks=torch.full((4,), 80.0))
    capped = window_attention(queries[0], keys[0], scale=0.25, soft_cap=1e-6)
    torch.testing.assert_close(plain.sum(-1), torch.ones(1, 4, 8))
    assert float(sunk.sum()) < 1e-3
    # A tiny cap makes attention uniform over what is visible.
    torch.testing.assert_close(capped[0, 0, -1], torch.full((40,), 1 / 40))
    assert float(capped[0, 0, 0, 33:].sum()) == 0.0


def test_dynamickv_divides_between_layers_that_hold_unequal_histories() -> None:
    """At later cuts they do. Scores below all others fill up a history without a change."""
    rng = torch.Generator().manual_seed(3)
    own = [torch.rand(1, 4, n, generator=rng) for n in (40, 64, 52)]
    filled = [torch.nn.functional.pad(s, (0, 64 - s.shape[2]), value=-1.0) for s in own]
    budgets = partial(dynamic_budgets, base=16, r_max=10.0, num_layers=4)
    assert budgets(own) == budgets(filled)
    method = DynamicKV(faithful=True, window=8)
    seen = [LayerScores(s[0, :2], {"query_heads": s[0]}) for s in own]
    weights = method.weights(seen, base=16, num_layers=3)
    assert weights.shape == (3,)
    assert weights.sum() > 0

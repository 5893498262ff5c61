"""Our methods against what kvpress keeps of the same inputs.

The vectors were recorded from kvpress by scripts/make_kvpress_vectors.py. Conventions that differ
are translated here and listed in docs/methods/README.md.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.budgets import token_budgets
from tests.support.layers import score_layers
from vllm_kvcompress.methods import (
    KeyDiff,
    Knorm,
    LayerScores,
    Method,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    Tova,
    Uniform,
)

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "kvpress"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != "inputs")


class Case(NamedTuple):
    """What kvpress did: fp32 scores [L, N, S] and kept tokens, bool [L, N, S]."""

    press: str
    params: dict[str, Any]
    scores: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]

    @property
    def ratio(self) -> float:
        return float(self.params["compression_ratio"])


@cache
def case(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz") as stored:
        meta = json.loads(bytes(stored["meta"]))
        return Case(meta["press"], meta["params"], stored["scores"], stored["kept"])


@cache
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [L, H, 32, D] and keys [L, N, S, D]."""
    with np.load(FOLDER / "inputs.npz") as stored:
        return torch.from_numpy(stored["queries"]), torch.from_numpy(stored["keys"])


def ours(recorded: Case) -> Method:
    """The same method with the same parameters; kvpress's own default window is 64."""
    params = recorded.params
    match recorded.press:
        case "SnapKVPress":
            return SnapKV(window=params["window_size"], kernel=params.get("kernel_size", 5))
        case "PyramidKVPress":
            return PyramidKV(window=params["window_size"], beta=params.get("beta", 20))
        case "StreamingLLMPress":
            return StreamingLLM(window=1, sinks=params.get("n_sink", 4))
        case "TOVAPress":
            return Tova()
        case "KeyDiffPress":
            return KeyDiff(window=1)
        case "KnormPress":
            return Knorm(window=1)
    raise AssertionError(f"no method of ours stands for {recorded.press}")


def score_all(method: Method) -> list[LayerScores]:
    return score_layers(method, *inputs(), base=0)


def test_every_baseline_that_kvpress_has_is_compared() -> None:
    found = {ours(case(name)).name for name in CASES}
    assert found == {"snapkv", "pyramidkv", "streamingllm", "tova", "keydiff", "knorm"}


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_are_kept(name: str) -> None:
    """Per layer and KV head as sets, with as many history tokens as kvpress kept there."""
    recorded = case(name)
    method = ours(recorded)
    for layer, scores in enumerate(score_all(method)):
        history = scores.tokens.shape[1]
        for head in range(len(scores.tokens)):
            theirs = np.flatnonzero(recorded.kept[layer, head, :history])
            chosen = method.select(scores, len(theirs))[head]
            assert chosen.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((n, ours(case(n))) for n in CASES if case(n).press != "StreamingLLMPress"),
        ("snapkv_w32_k7", Uniform(window=32, kernel=7)),
    ],
    ids=lambda given: getattr(given, "name", given),
)
def test_the_same_scores_are_given(name: str, method: Method) -> None:
    recorded = case(name)
    for layer, scores in enumerate(score_all(method)):
        expected = torch.from_numpy(recorded.scores[layer])[:, : scores.tokens.shape[1]]
        torch.testing.assert_close(scores.tokens, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_budgets_are_translated(name: str) -> None:
    """kvpress keeps int(S (1 - ratio)) tokens; but PyramidKV's mean is that without the window."""
    recorded = case(name)
    method = ours(recorded)
    layers, _, tokens = recorded.kept.shape
    capacity = int(tokens * (1 - recorded.ratio))
    kept = recorded.kept.sum(axis=2)
    assert (kept[:, 0] == kept[:, 1]).all()
    if recorded.press != "PyramidKVPress":
        assert kept[:, 0].tolist() == [capacity] * layers
        return
    found = token_budgets(method, score_all(method), base=capacity, num_layers=layers)
    # Both round the same real line, which kvpress means to include the window and we do not.
    assert np.abs(found - kept[:, 0]).max() <= 1
    assert found.sum() == capacity * layers


@pytest.mark.parametrize(
    "name", [n for n in CASES if case(n).press not in ("KeyDiffPress", "KnormPress")]
)
def test_the_window_is_protected_on_both_sides(name: str) -> None:
    """Not by kvpress where keys alone decide: there we keep at least the last token as well."""
    recorded = case(name)
    assert recorded.kept[..., -ours(recorded).window :].all()

"""The same prompt through Hugging Face transformers, eager and in fp32, and through the engine.

What transformers' attention matrices give under the formulas of CAKE's paper and release (mean plus
gamma times unbiased variance of the last 32 queries, pooled over 5 tokens, mean over a KV group;
entropy times total variance per layer) is written out here once more, in the plainest way, and
shares no code with the package.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.e2e.harness import MODELS, QUALITY, REPO, Engines
from vllm_kvcompress.methods import LayerInput, LayerScores, Method, Scorer
from vllm_kvcompress.tools.evaluation.tasks.needle import niah_single_2

pytestmark = pytest.mark.engine

MODEL = MODELS / QUALITY
RULER = REPO / "models" / "ruler"

LENGTH = 640
BLOCK_SIZE = 32
WINDOW = 32
BUDGET = 0.25
NEW_TOKENS = 12


@dataclass
class Seen:
    """What the engine computed for the prompt, layer by layer, and what it then generated."""

    scores: list[LayerScores] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # [N, count], history only
    generated: list[int] = field(default_factory=list)


@dataclass
class Reference:
    """The same from transformers; ``cache`` holds the full prompt."""

    entropy: Tensor  # [L]
    shift: Tensor  # [L]
    scores: Tensor  # [L, N, S']
    cache: Any
    model: Any
    first_token: int


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A needle prompt of about LENGTH tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    (needle,) = niah_single_2(RULER, count_tokens, length=LENGTH, count=1)
    return list(tokenizer(needle.text)["input_ids"])


@pytest.fixture(scope="module")
def engine(engines: Engines, prompt: list[int]) -> Seen:
    """Run the engine, looking over CAKE's shoulder."""
    seen = Seen()
    score, select = Method.score, Scorer.select

    def recorded_score(self: Method, layer: LayerInput) -> LayerScores:
        seen.scores.append(score(self, layer))
        return seen.scores[-1]

    def recorded_select(self: Scorer, tokens: Tensor, count: int) -> Tensor:
        seen.kept.append(select(self, tokens, count))
        return seen.kept[-1]

    running = engines.get("cake", BUDGET, model=QUALITY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "score", recorded_score)
        patch.setattr(Scorer, "select", recorded_select)
        (seen.generated,) = running.generate([prompt], NEW_TOKENS)
    assert seen.scores, "the engine must run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
    return seen


@pytest.fixture(scope="module")
def reference(prompt: list[int]) -> Iterator[Reference]:
    """Run transformers."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    cache = DynamicCache()
    with torch.inference_mode():
        output = model(
            torch.tensor([prompt]),
            past_key_values=cache,
            output_attentions=True,
            logits_to_keep=1,
        )
    entropy, shift, scores = [], [], []
    kv_heads = model.config.num_key_value_heads
    for attention in output.attentions:
        history = attention[0, :, -WINDOW:, :-WINDOW]  # [H, w, S'], not normalised again
        entropy.append(-(history * (history + 1e-30).log()).double().sum())
        shift.append(history.var(dim=1, unbiased=True).double().sum())
        indicator = history.mean(dim=1) + 200.0 * history.var(dim=1, unbiased=True)
        pooled = F.avg_pool1d(indicator[None], kernel_size=5, stride=1, padding=2)[0]
        scores.append(pooled.view(kv_heads, -1, pooled.shape[-1]).mean(dim=1))
    first_token = int(output.logits[0, -1].argmax())
    yield Reference(
        torch.stack(entropy), torch.stack(shift), torch.stack(scores), cache, model, first_token
    )
    del model, output
    gc.collect()


def _shares(preference: Tensor, total: int, cap: int) -> Tensor:
    """Real-valued water-filling: shares in proportion, none above the cap, ``total`` in all."""
    share = torch.zeros_like(preference)
    full = torch.zeros(len(preference), dtype=torch.bool)
    while True:
        left = total - cap * int(full.sum())
        share = torch.where(full, float(cap), left * preference / preference[~full].sum())
        if not bool((share > cap)[~full].any()):
            return share
        full |= share >= cap


def test_layer_statistics(engine: Seen, reference: Reference) -> None:
    entropy = torch.tensor([s.stat("log_entropy") for s in engine.scores]).double().exp()
    shift = torch.tensor([s.stat("log_shift") for s in engine.scores]).double().exp()
    torch.testing.assert_close(entropy, reference.entropy, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(shift, reference.shift, rtol=1e-3, atol=0.0)


def test_token_scores(engine: Seen, reference: Reference) -> None:
    ours = torch.stack([s.tokens for s in engine.scores])
    assert ours.shape == reference.scores.shape
    error = (ours - reference.scores).abs().amax(dim=-1) / reference.scores.amax(dim=-1)
    assert float(error.max()) < 2e-3


def test_page_budgets(engine: Seen, reference: Reference, prompt: list[int]) -> None:
    layers = len(engine.kept)
    pages = np.array([(k.shape[1] + WINDOW) / BLOCK_SIZE for k in engine.kept])
    assert (pages == pages.round()).all(), "whole pages"
    average = -(-int(np.ceil(BUDGET * len(prompt))) // BLOCK_SIZE)
    assert pages.sum() == average * layers
    assert len(set(pages)) > 3, "layers differ"
    # The window's page comes first, the rest is shared by the preference.
    shares = _shares(
        reference.entropy ** (1 / 1.5) * reference.shift ** (1 / 0.6),
        total=(average - 1) * layers,
        cap=len(prompt) // BLOCK_SIZE - 1,
    )
    assert np.abs(pages - 1 - shares.numpy()).max() < 1.0, "rounded to a neighbouring page"


def test_kept_tokens(engine: Seen, reference: Reference) -> None:
    shared = total = 0
    for kept, scores in zip(engine.kept, reference.scores, strict=True):
        expected = scores.topk(kept.shape[1], dim=-1).indices
        for ours, theirs in zip(kept.tolist(), expected.tolist(), strict=True):
            assert len(set(ours)) == len(ours)
            shared += len(set(ours) & set(theirs))
            total += len(ours)
    assert shared / total >= 0.99


def test_decoding(engine: Seen, reference: Reference, prompt: list[int]) -> None:
    """transformers, with its cache cut down to the same tokens, generates the same."""
    cache, model = reference.cache, reference.model
    for layer, kept in zip(cache.layers, engine.kept, strict=True):
        window = torch.arange(len(prompt) - WINDOW, len(prompt)).expand(len(kept), -1)
        index = torch.cat([kept, window], dim=1)[None, :, :, None]
        index = index.expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    generated = [reference.first_token]
    with torch.inference_mode():
        while len(generated) < NEW_TOKENS:
            output = model(
                torch.tensor([generated[-1:]]),
                past_key_values=cache,
                position_ids=torch.tensor([[len(prompt) + len(generated) - 1]]),
                # A single query sees all there is: no mask, whatever the layers' lengths.
                attention_mask={"full_attention": None},
            )
            generated.append(int(output.logits[0, -1].argmax()))
    assert engine.generated == generated

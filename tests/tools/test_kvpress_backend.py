"""Answers of kvpress behind the harness's interface, against kvpress used as its README says.

What needs kvpress is skipped where it is missing; scripts/setup_kvpress_env.sh makes an environment
with it:

    .venv-kvpress/bin/python -m pytest -p no:cacheprovider tests/tools/test_kvpress_backend.py
"""

from __future__ import annotations

import contextlib
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vllm_kvcompress.tools.evaluation.backend import Answer, EncodedPrompt
from vllm_kvcompress.tools.evaluation.batched_decoding import Continuation, prepare
from vllm_kvcompress.tools.evaluation.kvpress_backend import (
    PRESSES,
    KvpressBackend,
    check_setting,
    once_per_layer,
    ratio_for,
)
from vllm_kvcompress.tools.evaluation.setting import Setting, full, kept_tokens
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt

VOCABULARY, LAYERS, END = 96, 4, 95
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # large, so that answers depend on what attention finds
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": END,
}
MAX_TOKENS = 8
UNEVEN = (
    # Layers of four lengths; at smaller budgets kvpress's PyramidKV falls back to SnapKV.
    Setting("pyramidkv@0.6", "pyramidkv", 0.6),
    Setting("pyramidkv, window 8", "pyramidkv", 96, {"window_size": 8, "beta": 4}),
)
EVEN = (
    full(),
    *(Setting(f"{method}@96", method, 96) for method in PRESSES),
    *(Setting(f"{method}@0.6", method, 0.6) for method in PRESSES if method != "pyramidkv"),
    Setting("snapkv, window 8", "snapkv", 64, {"window_size": 8, "kernel_size": 7}),
)
SETTINGS = EVEN + UNEVEN


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a tokenizer of words w00, w01, ..."""
    out = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    if request.param == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.save_pretrained(out)
    words = {f"w{index:02}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w00"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{END}").save_pretrained(out)
    return out


def ids(seed: int, count: int) -> tuple[int, ...]:
    drawn = random.Random(seed)
    return tuple(drawn.randrange(END) for _ in range(count))


def case(seed: int, tokens: int, fed: int = 0, measured: int = 0, **prompt: Any) -> EncodedPrompt:
    asked = Prompt(
        seed,
        "",
        **{"max_tokens": MAX_TOKENS, "metric": "match_all", "references": ("-",), **prompt},
    )
    return EncodedPrompt(asked, ids(seed, tokens), ids(seed + 100, fed), ids(seed + 200, measured))


def answers(
    backend: KvpressBackend, cases: list[EncodedPrompt], settings: tuple[Setting, ...] = SETTINGS
) -> dict[tuple[int, str], Answer]:
    backend.check(settings)
    found = backend.run([(case, settings) for case in cases])
    return {(case.prompt.index, setting.label): answer for case, setting, answer in found}


def words(token_ids: list[int]) -> str:
    return " ".join(f"w{token:02}" for token in token_ids if token != END)


class Reference:
    """kvpress as its own documentation uses it, one setting and one token at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.kvpress = pytest.importorskip("kvpress")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()

    def press(self, setting: Setting, tokens: int) -> Any:
        kept = kept_tokens(setting.budget, tokens, 32)
        ratio = ratio_for(setting.method, kept, tokens)
        name, _ = PRESSES[setting.method]
        return getattr(self.kvpress, name)(compression_ratio=ratio, **setting.params)

    def under(self, setting: Setting, tokens: int) -> Any:
        if setting.is_full:
            return contextlib.nullcontext()
        return self.press(setting, tokens)(self.model)

    @torch.inference_mode()
    def generate(self, case: EncodedPrompt, setting: Setting) -> str:
        tokens = len(case.token_ids)
        prompt = torch.tensor([case.token_ids])
        with self.under(setting, tokens):
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=DynamicCache(),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
        return words(out[0, tokens:].tolist())

    @torch.inference_mode()
    def logits(
        self, case: EncodedPrompt, setting: Setting, following: tuple[int, ...]
    ) -> torch.Tensor:
        """After the prompt and after each following token, [1 + F, V]."""
        tokens = len(case.token_ids)
        cache = DynamicCache()
        with self.under(setting, tokens):
            output = self.model(torch.tensor([case.token_ids]), past_key_values=cache)
        found = [output.logits[0, -1]]
        for position, token in enumerate(following, tokens):
            output = self.model(
                torch.tensor([[token]]),
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            )
            found.append(output.logits[0, -1])
        return torch.stack(found)

    def answer(self, case: EncodedPrompt, setting: Setting) -> str:
        said: list[int] = []
        while len(said) < case.prompt.max_tokens and END not in said:
            logits = self.logits(case, setting, (*case.fed_ids, *said))
            said.append(int(logits[-1].argmax()))
        return words(said)


def backend(folder: Path, dtype: str = "float32") -> KvpressBackend:
    pytest.importorskip("kvpress")
    return KvpressBackend(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_generate_under_a_press(folder: Path, dtype: str) -> None:
    ours, theirs = backend(folder, dtype), Reference(folder, getattr(torch, dtype))
    cases = [case(1, 200), case(2, 333)]
    if dtype == "float32":
        found = answers(ours, cases)
    else:
        # Products of bf16 matrices depend on how many rows they have; one row is what they run.
        found = {}
        for one in cases:
            for setting in SETTINGS:
                found |= answers(ours, [one], (setting,))
    for one in cases:
        for setting in SETTINGS:
            expected = theirs.generate(one, setting)
            assert found[one.prompt.index, setting.label].text == expected, setting.label


def test_what_is_fed_after_the_cut_is_read_as_in_the_pipeline(folder: Path) -> None:
    ours, theirs = backend(folder), Reference(folder, torch.float32)
    one = case(3, 250, fed=9)
    pipeline = theirs.kvpress.KVPressTextGenerationPipeline(
        model=theirs.model, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder)
    )
    inputs = {
        "context_ids": torch.tensor([one.token_ids]),
        "questions_ids": [torch.tensor([one.fed_ids])],
    }
    for setting in EVEN:
        press = None if setting.is_full else theirs.press(setting, 250)
        with torch.inference_mode():
            expected = pipeline._forward(inputs, max_new_tokens=MAX_TOKENS, press=press)[0]
        assert answers(ours, [one], (setting,))[3, setting.label].text == expected, setting.label


def test_layers_of_different_lengths_read_what_is_fed_in_order(folder: Path) -> None:
    # kvpress's own pipeline has one mask for all layers and fails here.
    ours, theirs = backend(folder), Reference(folder, torch.float32)
    one = case(4, 250, fed=9)
    found = answers(ours, [one])
    for setting in UNEVEN:
        assert found[4, setting.label].text == theirs.answer(one, setting), setting.label


def test_likelihoods(folder: Path) -> None:
    ours, theirs = backend(folder), Reference(folder, torch.float32)
    cases = [case(5, 200, measured=40), case(6, 230, fed=5, measured=33)]
    found = answers(ours, cases)
    for one in cases:
        for setting in SETTINGS:
            logits = theirs.logits(one, setting, (*one.fed_ids, *one.measured_ids))
            count = len(one.measured_ids)
            expected = torch.nn.functional.cross_entropy(
                logits[-count - 1 : -1], torch.tensor(one.measured_ids)
            )
            answer = found[one.prompt.index, setting.label]
            assert answer.nll == pytest.approx(float(expected), abs=1e-4), setting.label
            assert (answer.text, answer.tokens) == ("", count)


def test_bytes_kept_are_those_of_this_package(folder: Path) -> None:
    found = answers(backend(folder), [case(7, 401, max_tokens=1)])
    for setting in SETTINGS:
        assert found[7, setting.label].kept_tokens == kept_tokens(setting.budget, 401, 32)


def test_a_prompt_that_fits_is_not_cut(folder: Path) -> None:
    found = answers(backend(folder), [case(8, 90)], EVEN[:6])
    assert {answer.text for answer in found.values()} == {found[8, "full"].text}
    assert {answer.kept_tokens for answer in found.values()} == {90}


def test_an_answer_ends_where_nothing_can_change_it(folder: Path) -> None:
    ours = backend(folder)
    whole = answers(ours, [case(9, 150)])[9, "full"]
    first, second, *_ = whole.text.split()
    to_numbers = answers(ours, [case(9, 150, references=(second,))])[9, "full"]
    assert (to_numbers.text, to_numbers.tokens) == (f"{first} {second}", 2)


def test_a_window_that_does_not_fit_the_budget_is_refused(folder: Path) -> None:
    setting = Setting("snapkv, wide", "snapkv", 64, {"window_size": 65})
    with pytest.raises(EvaluationError, match="set window_size to at most 64"):
        answers(backend(folder), [case(10, 200)], (setting,))


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is installed")
def test_where_kvpress_is_missing_one_is_told_how_to_get_it(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"scripts/setup_kvpress_env\.sh"):
        KvpressBackend(folder)


@torch.inference_mode()
def test_rows_of_several_prompts_go_on_as_each_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prepare(model)
    cases = [case(11, 40, fed=6), case(12, 70, fed=3)]
    parts = []
    for one in cases:
        cache = DynamicCache()
        logits = model(torch.tensor([one.token_ids]), past_key_values=cache).logits[:, -1]
        rows = [DynamicCache(), DynamicCache()]
        for index, layer in enumerate(cache.layers):
            for row in rows:
                row.update(layer.keys, layer.values, index)
        part = Continuation.after(model, rows, logits, len(one.token_ids))
        part.feed(torch.tensor([one.fed_ids]))
        parts.append(part)
    joined = Continuation.join(parts)
    joined.select([0, 3])
    joined.feed(torch.tensor([[5], [6]]))
    for logits, one, token in zip(joined.logits, cases, (5, 6), strict=True):
        alone = model(torch.tensor([[*one.token_ids, *one.fed_ids, token]])).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_the_ratio_keeps_exactly_what_is_asked() -> None:
    drawn = random.Random(0)
    for _ in range(20_000):
        tokens = drawn.randint(2, 40_000)
        kept = drawn.randint(1, tokens - 1)
        assert int(tokens * (1 - ratio_for("snapkv", kept, tokens))) == kept
        assert round(tokens * (1 - ratio_for("pyramidkv", kept, tokens))) == kept


def test_shared_scores_are_worked_out_once_per_layer() -> None:
    class Layer:
        def __init__(self, index: int) -> None:
            self.layer_idx = index

    asked: list[int] = []

    def score(module: Layer) -> torch.Tensor:
        asked.append(module.layer_idx)
        return torch.tensor(float(module.layer_idx))

    shared = once_per_layer(score)
    for layer in (Layer(0), Layer(1)):
        for _ in range(3):
            assert int(shared(layer)) == layer.layer_idx
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (Setting("x", "cake", 64), "method 'cake' is not compared with kvpress; it is one of snap"),
        (Setting("x", "snapkv", 64, {"window": 8}), "'window' is none of snapkv in kvpress"),
        (Setting("x", "keydiff", 64, {"n_sink": 8}), "which takes none"),
        (Setting("x", "snapkv", 64, {"kernel_size": 4}), "must be an odd number from 1, got 4"),
        (Setting("x", "pyramidkv", 64, {"beta": 0.5}), "must be a whole number from 1, got 0.5"),
        (Setting("x", "expected_attention", 64, {"use_vnorm": 1}), "must be true or false, got 1"),
        (Setting("x", "streamingllm", 1.5), "got 1.5"),
    ],
)
def test_what_kvpress_does_not_have_is_refused(setting: Setting, sentence: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        check_setting(setting, 32)
    assert sentence in str(caught.value)


def test_what_kvpress_has_passes() -> None:
    for setting in SETTINGS:
        check_setting(setting, 32)

"""What ``kvcompress plan`` refuses: each reason is one sentence on stderr."""

import json
from pathlib import Path

import pytest
from vllm.config import ModelConfig
from vllm.platforms.interface import UnspecifiedPlatform

from tests.support.commands import LLAMA, folder, plan, refusal
from tests.support.compatibility_page import refusals
from tests.support.refusals import REFUSED_MODELS, models_folder

MEMORY = ("--kv-cache-memory", "1MiB")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--context 2000", "--context 2000 is beyond the model's 1024 tokens"),
        ("--context 200", "--output 256 leaves no prompt: it must be below --context 200"),
        ("--budget 0", "kv-compression-budget must be a whole number"),
        ("--budget 40", "kv-compression-budget 40 is too small: cake needs at least 48"),
        ("--method cacke", 'unknown method "cacke", known are cake'),
        ('--config {"gama":1}', 'cake: unknown parameter "gama"'),
        ('--config {"budget":1}', "budget does not belong"),
        ("--tensor-parallel-size 2", "tensor or pipeline parallelism is not yet supported"),
        ("--device cpu --kv-cache-dtype fp8", "a quantized KV cache on the CPU is not"),
        ("--block-size 24", "a block size of 24 is not supported with --kv-compression; set --blo"),
        ("--device cpu --block-size 24", "a block size of 24 is not supported"),
        ("--device cpu --block-size 48", "a block size of 48 is not supported"),
        ("--device cpu", "attention with heads of 16 on the CPU is not supported"),
        ("--max-num-seqs 65 --max-num-batched-tokens 64", "--max-num-seqs 65 is more than"),
        ("--gpu-memory-utilization 0.5", "--gpu-memory-utilization needs --gpu-memory"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "--model", folder(tmp_path), *MEMORY, *words.split()]
    assert refusal(capsys, given).startswith(sentence)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_folder(tmp_path_factory)


@pytest.mark.parametrize("feature", [*REFUSED_MODELS, "images that see later tokens"])
def test_models_that_the_engine_refuses_are_refused_with_its_sentence(
    feature: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if feature not in REFUSED_MODELS:
        monkeypatch.setattr(ModelConfig, "is_mm_prefix_lm", property(lambda _: True))
    for model in REFUSED_MODELS.get(feature, [LLAMA]):
        (root / "config.json").write_text(json.dumps(model))
        assert refusal(capsys, ["plan", "--model", str(root), *MEMORY]) == refusals()[feature]


def test_a_machine_without_a_device_plans_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's CUDA build does on a machine that has no GPU."""
    expected = plan(folder(tmp_path))
    monkeypatch.setattr("vllm.config.model.current_platform", UnspecifiedPlatform())
    assert plan(folder(tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot use the configuration"),
        ('{"hidden_size": 3}', "cannot use the configuration"),
        ('{"model_type": "perpetuum"}', "cannot use the configuration"),
        (json.dumps({**LLAMA, "num_hidden_layers": "five"}), "expected int, got str"),
        (json.dumps({**LLAMA, "num_attention_heads": 0}), "cannot use the configuration"),
        (None, "is neither a folder with a config.json, nor such a file, nor a model of the hub"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(
    text: str | None,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # vLLM tries again after two seconds
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    said = refusal(capsys, ["plan", "--model", str(path), *MEMORY])
    assert str(path) in said
    assert sentence in said


def test_weights_that_leave_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, ["plan", "--model", folder(tmp_path), "--gpu-memory", "200KiB"])
    assert "leave nothing of 200.00 KiB x 0.92" in said

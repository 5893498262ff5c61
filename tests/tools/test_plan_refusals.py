"""What ``kvcompress plan`` refuses: each reason is one sentence on stderr."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_plan import LLAMA, folder
from vllm_kvcompress.tools.cli import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--context 2000", "--context 2000 is beyond the model's 1024 tokens"),
        ("--context 200", "--output 256 leaves no prompt: it must be below --context 200"),
        ("--budget 0", "kv-compression-budget must be a whole number"),
        ("--budget 40", "kv-compression-budget 40 is too small: cake needs at least 48"),
        ("--method cacke", 'unknown method "cacke", known are cake'),
        ('--config {"gama":1}', 'cake: unknown parameter "gama"'),
        ('--config {"budget":1}', "budget does not belong in"),
        ("--tensor-parallel-size 2", "tensor or pipeline parallelism is not yet supported"),
        ("--device cpu --kv-cache-dtype fp8", "a quantized KV cache on the CPU is not"),
        ("--block-size 24", "--block-size must be a multiple of 16 on a GPU, got 24"),
        ("--gpu-memory-utilization 0.5", "--gpu-memory-utilization needs --gpu-memory"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "--model", folder(tmp_path), "--kv-cache-memory", "1MiB", *words.split()]
    assert main(given) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith(f"kvcompress plan: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention (MLA)"),
        ({"model_type": "mistral", "sliding_window": 128}, "models of sliding windows alone"),
        (
            {"model_type": "gemma2", "layer_types": ["sliding_attention"] * 26},
            "models of sliding windows alone",
        ),
        (
            {
                "model_type": "gemma2",
                "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 21,
            },
            "a model whose full-attention layers fill 5 KV-cache groups",
        ),
        ({"model_type": "llama4_text"}, "models with chunked local attention"),
        ({"model_type": "jamba"}, "Mamba and other recurrent models"),
        ({"model_type": "t5"}, "encoder-decoder models"),
        ({"model_type": "bloom"}, "models with ALiBi"),
        ({"architectures": ["BertForMaskedLM"]}, "models that do not generate text"),
    ],
)
def test_models_that_the_engine_refuses_are_refused(
    changes: dict[str, Any], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "model_type" in changes:
        kept = {} if changes["model_type"] != "mistral" else LLAMA
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**kept, **changes}))
    else:
        folder(tmp_path, **changes)
    assert main(["plan", "--model", str(tmp_path), "--kv-cache-memory", "1MiB"]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert what in error
    assert "not supported with --kv-compression" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot read the configuration"),
        ('{"hidden_size": 3}', "cannot read the configuration"),
        ('{"model_type": "perpetuum"}', "cannot read the configuration"),
        (json.dumps({**LLAMA, "num_hidden_layers": "five"}), "expected int, got str"),
        (None, "is neither a folder with a config.json, nor such a file, nor a model of the hub"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(
    text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["plan", "--model", str(path), "--kv-cache-memory", "1MiB"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert sentence in error
    assert error.count("\n") == 1


def test_weights_that_leave_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", folder(tmp_path), "--gpu-memory", "200KiB"]) == 2
    assert "leave nothing of 200.00 KiB x 0.92" in capsys.readouterr().err

"""What tests of the sub-commands of `kvcompress` share."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import refusals
from tests.support.model_classes import inspect_in_process
from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.tools.cli import build_parser, main
from vllm_kvcompress.tools.plan.command import make_report
from vllm_kvcompress.tools.plan.model import ServedModel
from vllm_kvcompress.tools.plan.report import PlanReport

inspect_in_process()

SERVED = ServedModel(
    name="m",
    architecture="LlamaForCausalLM",
    layers=3,
    groups=LayerGroups(3),
    compressed=(),
    heads=4,
    kv_heads=2,
    head_size=16,
    dtype=torch.bfloat16,
    max_model_len=8192,
    default_model_len=8192,
    quantized=False,
)
"""A small model."""

LLAMA = {
    **refusals.LLAMA,
    "num_hidden_layers": 5,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def folder(path: Path, **changes: Any) -> str:
    """A model folder that holds a configuration only."""
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return str(path)


def plan(model: str, *words: str, memory: str = "1MiB") -> PlanReport:
    """The plan of a command line; ``memory`` is the KV cache unless a word gives a size."""
    given = ["plan", "--model", model]
    if "--gpu-memory" not in words:
        given += ["--kv-cache-memory", memory]
    return make_report(parsed(given, *words))


def parsed(words: Sequence[str], *more: str) -> argparse.Namespace:
    """Return the arguments of a command line."""
    return build_parser().parse_args([*words, *more])


def refusal(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """Return the sentence on stderr that refuses a command line, with status 2.

    Nothing else is printed; only for ``bench`` vLLM may have said something before.
    """
    try:
        status = main(list(words))
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    out, error = capsys.readouterr()
    assert status == 2
    assert out == ""
    *before, sentence = error.splitlines()
    command = f"kvcompress {words[0]}: "
    assert sentence.startswith(command)
    assert not before or words[0] == "bench"
    return sentence.removeprefix(command)

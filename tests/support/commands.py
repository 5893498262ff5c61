"""What tests of the sub-commands of `kvcompress` share."""

import argparse
from collections.abc import Sequence

import pytest
import torch

from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.tools.cli import build_parser, main
from vllm_kvcompress.tools.plan.model import ServedModel

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


def parsed(words: Sequence[str], *more: str) -> argparse.Namespace:
    """Return the arguments of a command line."""
    return build_parser().parse_args([*words, *more])


def refusal(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """Return what a command line says on stderr; it must end with status 2 and say nothing else."""
    try:
        status = main(list(words))
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    out, error = capsys.readouterr()
    assert status == 2
    assert out == ""
    return error

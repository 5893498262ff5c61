"""A model's first layers and tokens as a model of its own: real weights, quick to compute."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

NUM_TOKENS = 4096
"""Vocabulary of the models that :func:`first_layers` makes."""


def cut_model(
    source: Path, target: Path, num_layers: int, num_tokens: int, cut_tokenizer: bool = True
) -> Path:
    """Write the first layers and tokens of a Hugging Face folder to another; return that.

    Args:
        source: Folder with config.json, one or more safetensors files and a tokenizer.
        target: Folder to make.
        num_layers: How many layers to keep.
        num_tokens: How many tokens of the vocabulary to keep. Multiplying hidden states with a
            whole vocabulary takes longer than a few layers do.
        cut_tokenizer: Cut the tokenizer too, which must be one of byte pairs whose ids have the
            order of its merges; otherwise it knows more tokens than the model.

    """
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers
    config["vocab_size"] = num_tokens
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if cut_tokenizer:
        _cut_tokenizer(source / "tokenizer.json", target / "tokenizer.json", num_tokens)
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    layer = name.partition(".layers.")[2].partition(".")[0]
                    if name.endswith("embed_tokens.weight"):
                        tensors[name] = weights.get_slice(name)[:num_tokens]
                    elif not layer or int(layer) < num_layers:
                        tensors[name] = weights.get_tensor(name)
        elif not (target / file.name).exists():
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _cut_tokenizer(source: Path, target: Path, num_tokens: int) -> None:
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < num_tokens}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    target.write_text(json.dumps(tokenizer), encoding="utf-8")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the models of this process lie until it ends."""
    return tempfile.TemporaryDirectory(prefix="first-layers-")


@cache
def first_layers(source: Path, num_layers: int, cut_tokenizer: bool = True) -> Path:
    """Return a folder with a model's first layers and 4096 tokens, made once per process.

    Args:
        source: As for :func:`cut_model`.
        num_layers: How many layers to keep.
        cut_tokenizer: As for :func:`cut_model`.

    """
    target = Path(_folder().name) / f"{source.name}-{num_layers}"
    return cut_model(source, target, num_layers, NUM_TOKENS, cut_tokenizer)

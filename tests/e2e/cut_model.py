"""A model's first layers and tokens as a model of its own: real weights, quick to compute."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NUM_TOKENS = 4096
"""Vocabulary of such a model: multiplying with a whole one takes longer than a few layers do."""

_FOLDER = tempfile.TemporaryDirectory(prefix="first-layers-")
"""Where the models of this process lie until it ends."""


@cache
def first_layers(source: Path, num_layers: int, cut_tokenizer: bool = True) -> Path:
    """Return a folder with a model's first layers and 4096 tokens, made once per process.

    Args:
        source: Folder with config.json, one or more safetensors files and a tokenizer.
        num_layers: How many layers to keep.
        cut_tokenizer: Cut the tokenizer too, which must be one of byte pairs whose ids have the
            order of its merges; otherwise it knows more tokens than the model.

    """
    target = Path(_FOLDER.name) / f"{source.name}-{num_layers}"
    target.mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": num_layers, "vocab_size": NUM_TOKENS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:num_layers]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if cut_tokenizer:
        _cut_tokenizer(source / "tokenizer.json", target / "tokenizer.json")
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    layer = name.partition(".layers.")[2].partition(".")[0]
                    if name.endswith("embed_tokens.weight"):
                        tensors[name] = weights.get_slice(name)[:NUM_TOKENS]
                    elif not layer or int(layer) < num_layers:
                        tensors[name] = weights.get_tensor(name)
        elif not (target / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@cache
def with_fp8_cache(source: Path, scales: tuple[tuple[float, ...], ...]) -> Path:
    """Return a folder with the same model, calibrated for an FP8 cache; made once per process.

    Args:
        source: Folder of a model in one safetensors file.
        scales: Of queries, keys and values, a number for each layer.

    """
    target = Path(_FOLDER.name) / f"{source.name}-fp8-{hash(scales)}"
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    scheme = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(target / "model.safetensors")
    for kind, numbers in zip("qkv", scales, strict=True):
        for layer, number in enumerate(numbers):
            name = f"model.layers.{layer}.self_attn.{kind}_scale"
            tensors[name] = torch.tensor([number])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _cut_tokenizer(source: Path, target: Path) -> None:
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < NUM_TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    target.write_text(json.dumps(tokenizer), encoding="utf-8")

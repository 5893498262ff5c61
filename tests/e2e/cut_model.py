"""A model's first layers as a model of its own: real weights, small enough for an interpreter."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def cut_model(source: Path, target: Path, num_layers: int) -> Path:
    """Write the first layers of a Hugging Face folder to another; return that.

    Args:
        source: Folder with config.json, one or more safetensors files and a tokenizer.
        target: Folder to make.
        num_layers: How many layers to keep.

    """
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:num_layers]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    layer = name.partition(".layers.")[2].partition(".")[0]
                    if not layer or int(layer) < num_layers:
                        tensors[name] = weights.get_tensor(name)
        elif file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the models of this process lie until it ends."""
    return tempfile.TemporaryDirectory(prefix="first-layers-")


@cache
def first_layers(source: Path, num_layers: int) -> Path:
    """Return a folder with a model's first layers, made once per process.

    Args:
        source: As for :func:`cut_model`.
        num_layers: How many layers to keep.

    """
    target = Path(_folder().name) / f"{source.name}-{num_layers}"
    return cut_model(source, target, num_layers)

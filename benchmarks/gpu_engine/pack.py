"""Packs vLLM for a machine with a GPU, PyTorch and Triton that reaches no package index.

    python -m benchmarks.gpu_engine.pack build/gpu-pack

vLLM's wheel for CUDA is 311 MiB, and what it needs as much again; together with this repository no
more than 64 MiB may come along. What makes it fit: Python files and the two libraries that serving
needs, their device code for one generation of GPUs (``device_code.py``), and one archive whose
compressor sees libraries whole. vLLM's Python files alone do not serve: its CUDA platform imports
``vllm._C_stable_libtorch`` at once. That library is built against PyTorch's stable ABI, so it loads
with PyTorch 2.11 too, for which vLLM 0.32 was not made.
"""

import argparse
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_engine.device_code import trim

REPO = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ARCHIVE = "engine.tar.xz"
LIMIT = 64 << 20
"""Bytes of the repository's tracked files and the pack."""

LEFT_OUT = ("vllm/vllm-rs", "vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/")
"""A server in Rust, and kernels for other models and GPUs: never loaded here."""

LIBRARIES = {"vllm/_C_stable_libtorch.abi3.so", "vllm/spinloop.abi3.so", "vllm/fs_io_C.abi3.so"}
ATTENTION = {
    8: "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    9: "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
}
"""vLLM's FlashAttention by major compute capability; elsewhere TRITON_ATTN alone is packed."""

# Repeats lie further apart in a library than a compressor looks by default: FlashAttention 3 is
# 165 MiB, 41 MiB in the wheel and 8 MiB with this.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 192 << 20}]
_GLIBC = (39, 34, 31, 28, 27, 26, 24, 17, 12, 5)


def main() -> None:
    """Make the pack; see the module's docstring."""
    parser = argparse.ArgumentParser(description="pack vLLM for a machine with a GPU alone")
    parser.add_argument("folder", type=Path, help="where the archive goes")
    parser.add_argument("--python", default="3.12", help="of the machine (default: 3.12)")
    parser.add_argument("--capability", type=int, default=90, help="90 for H100 and H200")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    archive = args.folder / ARCHIVE
    with tempfile.TemporaryDirectory() as work:
        site = Path(work)
        install(site, args.python)
        select(site, args.capability)
        write(site, archive)
    size = archive.stat().st_size + sum(path.stat().st_size for path in tracked_files())
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB, {size / 2**20:.1f} with the files")
    if size > LIMIT:
        sys.exit(f"gpu_engine.pack: that is more than {LIMIT >> 20} MiB")


def install(site: Path, python: str) -> None:
    """Install the pinned packages for another machine: x86-64 Linux with this Python.

    Args:
        site: Folder that gets them.
        python: Its version.

    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--root-user-action=ignore",
        "--no-deps",
        "--no-compile",
    ]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform=manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    command += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command += ["--target", str(site), "--requirement", str(REQUIREMENTS)]
    subprocess.run(command, check=True)


def select(site: Path, capability: int) -> None:
    """Remove from an installed vLLM what serving a dense model does not need; trim the rest.

    Args:
        site: Folder with the packages; files are deleted and rewritten.
        capability: Compute capability of the GPU, times ten.

    """
    wanted = LIBRARIES | {ATTENTION.get(capability // 10, "")}
    for path in sorted(p for p in (site / "vllm").rglob("*") if p.is_file()):
        name = path.relative_to(site).as_posix()
        library = path.suffix == ".so"
        if name.startswith(LEFT_OUT) or (library and name not in wanted):
            path.unlink()
        elif library and path.stat().st_size > 1 << 20:
            path.write_bytes(trim(path.read_bytes(), capability))


def write(site: Path, archive: Path) -> None:
    """Write a folder's files to an archive, libraries side by side at its end."""
    with lzma.open(archive, "wb", filters=_FILTERS) as stream:  # noqa: SIM117 - one closes the other
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for path in sorted(_files(site), key=lambda p: (p.suffix == ".so", p)):
                tar.add(path, path.relative_to(site), filter=_anonymous)


def unpack(archive: Path, site: Path) -> None:
    """Unpack what :func:`write` wrote into a folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(site, filter="data")


def tracked_files() -> list[Path]:
    """Files of the repository that git knows."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True
    ).stdout
    return [REPO / name for name in names.split("\0") if name]


def _files(site: Path) -> Iterator[Path]:
    return (p for p in site.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()

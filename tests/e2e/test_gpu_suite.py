"""What scripts/gpu_suite.sh brings to a machine with a GPU, and that its checks run.

The pack is made of small files here; that the real one fits and loads is checked by whoever makes
it. Engines run as on the GPU, but through Triton's interpreter.
"""

import csv
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_engine import pack, suite
from benchmarks.gpu_engine.device_code import capabilities, trim
from vllm_kvcompress.engine.checks import TESTED_VERSION

REPO = Path(__file__).resolve().parents[2]
MACHINE = {"torch", "triton", "numpy"}


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Kind (1 PTX, 2 machine code), capability and code of each entry, as nvcc lays them out."""
    body = b""
    for kind, capability, code in entries:
        head = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 0, 1, 8, capability)
        body += head.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def contents(library: bytes, capability: int) -> list[bytes]:
    """What is left of the code in a trimmed library, in words of five letters."""
    return re.findall(rb"[a-z]{5}", trim(library, capability))


HOST = b"\1\2\3\4" * 9
KERNELS = (
    HOST
    + fat_binary((2, 80, b"early"), (2, 90, b"later"), (2, 90, b"other"), (1, 90, b"texts"))
    + HOST
    + fat_binary((1, 80, b"older"), (2, 89, b"minor"), (2, 120, b"newer"))
    + HOST
)


def test_a_trimmed_library_has_the_code_that_the_gpu_would_pick() -> None:
    assert contents(KERNELS, 90) == [b"later", b"other"]
    assert contents(KERNELS, 86) == [b"early"]
    assert contents(KERNELS, 89) == [b"early", b"minor"]
    assert contents(KERNELS, 120) == [b"newer"]
    assert contents(KERNELS, 75) == []


def test_a_trimmed_library_keeps_its_layout() -> None:
    trimmed = trim(KERNELS, 90)
    assert len(trimmed) == len(KERNELS)
    assert trimmed.count(HOST) == 3
    assert [m.start() for m in re.finditer(re.escape(HOST), trimmed)] == [
        m.start() for m in re.finditer(re.escape(HOST), KERNELS)
    ]
    # It still is one: what a reader of fat binaries finds is what was kept.
    assert capabilities(KERNELS) == {80: 1, 89: 1, 90: 2, 120: 1}
    assert capabilities(trimmed) == {90: 2}
    assert trim(trimmed, 90) == trimmed


def test_a_library_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="no device code"):
        trim(HOST, 90)
    with pytest.raises(ValueError, match="another layout"):
        trim(fat_binary((7, 90, b"later")), 90)
    with pytest.raises(ValueError, match="another layout"):
        trim(KERNELS[: len(HOST) + 100], 90)


def test_the_pack_holds_python_and_the_wanted_libraries(tmp_path: Path) -> None:
    site = tmp_path / "site"
    big = KERNELS + b"\0" * (1 << 20)
    files = {
        "vllm/__init__.py": b"import this",
        "vllm/_C_stable_libtorch.abi3.so": big,
        "vllm/_moe_C_stable_libtorch.abi3.so": big,
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": big,
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": big,
        "vllm/vllm-rs": b"server",
        "vllm/third_party/deep_gemm/jit.py": b"",
        "other/native.so": big,
    }
    for name, data in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(data)
    pack.select(site, 90)
    archive = tmp_path / pack.ARCHIVE
    pack.write(site, archive)
    pack.unpack(archive, tmp_path / "there")
    found = {
        p.relative_to(tmp_path / "there").as_posix(): p.read_bytes()
        for p in (tmp_path / "there").rglob("*")
        if p.is_file()
    }
    assert set(found) == {
        "vllm/__init__.py",
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
        "other/native.so",
    }
    assert found["vllm/_C_stable_libtorch.abi3.so"] == trim(big, 90)
    assert found["other/native.so"] == big, "only vLLM's libraries are known"


def requirements() -> dict[str, str]:
    """Names and versions that are packed."""
    lines = pack.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_all_that_is_packed_has_a_version_and_pytorch_is_not_packed() -> None:
    pinned = requirements()
    assert pinned["vllm"].startswith(f"{TESTED_VERSION}.")
    assert not MACHINE & set(pinned)
    assert list(pinned) == sorted(pinned)
    # With the archive, which was 53 MiB, this stays below the limit.
    assert sum(p.stat().st_size for p in pack.tracked_files()) < 8 << 20


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    results = tmp_path / "gpu.csv"
    deadline = time.monotonic() + 100
    assert not suite.check("no_such_check", "FLASH_ATTN", results, deadline, on_cpu=False)
    assert not suite.check("scatter_eager", "TRITON_ATTN", results, deadline - 100, on_cpu=False)
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_check = {row["check"]: row for row in rows}
    assert by_check["no_such_check"]["value"] == "failed"
    assert by_check["no_such_check"]["error"] == "KeyError: 'no_such_check'"
    assert by_check["scatter_eager"]["error"] == "left out: no time was left"
    assert all(row["torch"] and row["triton"] and row["vllm"] for row in rows)


@pytest.mark.slow
@pytest.mark.engine
def test_an_engine_runs_on_what_is_packed_alone(tmp_path: Path) -> None:
    """vLLM's Python serves with a method where only packed packages and PyTorch's can be found."""
    results = tmp_path / "gpu.csv"
    command = ["-m", "tests.support.packed_alone", "serve", "TRITON_ATTN", "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--csv", str(results)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with results.open(newline="") as file:
        rows = {row["check"]: row for row in csv.DictReader(file)}
    assert rows["serve"]["value"] == "ok"
    assert rows["serve"]["device"] == "cpu, interpreted"


@pytest.mark.slow
@pytest.mark.engine
def test_the_script_rehearses_engines(tmp_path: Path) -> None:
    options = ["--engine", "--cpu", "--quick", "--only", "engine", "--out", str(tmp_path)]
    done = subprocess.run(
        ["scripts/gpu_suite.sh", *options],
        cwd=REPO,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (results,) = tmp_path.glob("gpu_*.csv")
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["error"]]
    assert {row["check"] for row in rows if row["value"] == "ok"} >= set(suite.QUICK)

"""What the Triton kernels take of a GPU: registers, shared memory, spills. Needs no GPU.

    python -m benchmarks.kernel_resources > docs/kernel-resources.md
    python -m benchmarks.kernel_resources --check 256 512 --targets 89  # only whether they fit

Every kernel that a server's warm-up launches is compiled by the installed Triton for each target.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.start_launches import AttentionShape, WarmedWorker, observed
from kvcompress_kernels import scoring_triton

SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that a program may have, by compute capability (CUDA C++ guide)."""

PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "Llama 3.1 8B": AttentionShape(4, 32, 8, 128),
    "the same, FP8 cache": AttentionShape(4, 32, 8, 128, cache_dtype="fp8_e4m3"),
    "the same, fp32": AttentionShape(4, 32, 8, 128, fp32),
    "Qwen2.5 0.5B": AttentionShape(4, 14, 2, 64),
    "gpt-oss": AttentionShape(4, 64, 8, 64, sinks=True),
    "Phi-3 mini": AttentionShape(4, 32, 32, 96, fp16),
    "Gemma 2 9B": AttentionShape(4, 16, 8, 256, soft_cap=50.0),
    "Gemma 3, fp32": AttentionShape(4, 16, 8, 256, fp32),
    "512 wide": AttentionShape(4, 8, 1, 512),
    "512 wide, fp32": AttentionShape(4, 8, 1, 512, fp32),
}
CONFIG = {"method": "cake", "budget": 1024, "allow": {"method": ["cake", "dynamickv", "tova"]}}
BY_SHAPE = ("row_sums", "columns")
"""Kernels whose tiles depend on the model."""

HEAD = """# What the kernels take of a GPU

Written by `python -m benchmarks.kernel_resources > docs/kernel-resources.md`, which compiles what
a server's warm-up launches and needs no GPU. Triton {version}; vLLM 0.32 for CUDA has 3.7.1. A
cell is registers of a thread / bytes that a thread spills / KiB of shared memory of a program, the
most that any variant takes. A program may have 163 KiB on sm_80, 99 on sm_89 and sm_120, 227 on
sm_90 and sm_100. Nothing here was measured on a GPU.

"""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: Its name.
        target: Compute capability, such as 90.
        shared: Bytes of shared memory of a program.
        registers: Of a thread.
        spilled: Bytes of a thread's registers that lie in memory.

    """

    kernel: str
    target: int
    shared: int
    registers: int
    spilled: int


class _NoGPU:
    """Stands for the GPU that compiled kernels are for; nothing is ever launched."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled(shape: AttentionShape, target: int) -> Iterator[Resources]:
    """Compile what a server's warm-up launches, each kernel once per variant.

    Args:
        shape: The model's attention.
        target: Compute capability.

    """
    run = JITFunction.run
    found: dict[str, tuple[Any, Any]] = {}

    def compile_it(kernel: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "OPERAND" in kwargs:  # on the CPU it is what the interpreter takes
            operand = scoring_triton._operand(args[0].dtype, args[1].dtype)
            kwargs = {**kwargs, "OPERAND": operand}
        made = run(kernel, *args, grid=(1,), warmup=True, **kwargs)
        found.setdefault(made.hash, (kernel.fn.__name__, made))

    def own_size(device: torch.device) -> tuple[int, int]:
        return PROCESSORS[target], SHARED[target]

    driver.set_active(_NoGPU(target))
    size, scoring_triton._size = scoring_triton._size, own_size
    try:
        with observed(JITFunction, compile_it):
            WarmedWorker(shape, CONFIG).warm_up()
    finally:
        scoring_triton._size = size
    for name, made in found.values():
        registers, spilled = _usage(made.asm["cubin"])
        yield Resources(name, target, made.metadata.shared, registers, spilled)


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as the assembler's own tool says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    return int(usage[0]), int(usage[1])


def page(found: Mapping[str, Mapping[int, Sequence[Resources]]]) -> Iterator[str]:
    """Lines of the page.

    Args:
        found: What was compiled, by model and target.

    """
    targets = list(next(iter(found.values())))
    yield from HEAD.format(version=triton.__version__).splitlines()
    yield "| model | kernel | " + " | ".join(f"sm_{target}" for target in targets) + " |"
    yield "| --- |" + " --- |" * (1 + len(targets))
    said: set[str] = set()
    for model, by_target in found.items():
        kernels = dict.fromkeys(r.kernel for rows in by_target.values() for r in rows)
        for kernel in kernels:
            if said and kernel in said and kernel not in BY_SHAPE:
                continue  # the same for every model, nearly
            cells = [_cell(r for r in rows if r.kernel == kernel) for rows in by_target.values()]
            yield f"| {model} | {kernel} | " + " | ".join(cells) + " |"
        said |= kernels.keys()


def _cell(variants: Iterable[Resources]) -> str:
    """The most that any variant takes."""
    rows = list(variants)
    if not rows:
        return "-"
    registers, spilled = max(r.registers for r in rows), max(r.spilled for r in rows)
    return f"{registers} / {spilled} / {max(r.shared for r in rows) / 1024:.1f}"


def main() -> None:
    """Print the page, or check some head sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=int, metavar="D", nargs="+", default=[])
    parser.add_argument("--targets", type=int, nargs="+", default=list(SHARED))
    given = parser.parse_args()
    shapes = {
        f"{size} wide, {dtype}": AttentionShape(2, 16, 4, size, dtype)
        for size in given.check
        for dtype in (bf16, fp32)
    } or SHAPES
    found: dict[str, dict[int, list[Resources]]] = {}
    for model, shape in shapes.items():
        for target in given.targets:
            # FP8 numbers are converted from sm_89 on.
            possible = target >= 89 or shape.cache_dtype == "auto"
            rows = list(compiled(shape, target)) if possible else []
            found.setdefault(model, {})[target] = rows
            print(f"{model}, sm_{target}: {len(rows)} variants", file=sys.stderr)
    print("\n".join(page(found)))
    everything = [r for rows in found.values() for several in rows.values() for r in several]
    too_large = [r for r in everything if r.shared > SHARED[r.target]]
    if too_large:
        sys.exit(f"too much shared memory: {too_large}")


if __name__ == "__main__":
    main()

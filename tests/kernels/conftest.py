"""Kernel tests run on a GPU where there is one, else through Triton's interpreter on the CPU.

Nothing here may import vLLM: the suite also runs on GPU machines that have only torch and Triton.
"""

import importlib
import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("scoring", "selection", "compaction", "page_tables")


def _import_interpreted() -> None:
    """Import the Triton kernels with the interpreter on; the rest of the process keeps it off.

    Triton looks at the variable when a kernel is decorated, that is at import. Engines that other
    tests start in this process must not see it.
    """
    if "triton" in sys.modules:
        raise RuntimeError(
            "Triton was imported before the kernels' tests were: a test module under tests/engine "
            "must import vllm, transformers' models and the like in its tests, not at its top"
        )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # Triton's interpreter imports this on its first launch, when the variable is off again.
        importlib.import_module("triton.experimental.gluon.language")
        for name in KERNELS:
            importlib.import_module(f"kvcompress_kernels.{name}_triton")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if DEVICE == "cpu":
    _import_interpreted()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels under test run on."""
    return torch.device(DEVICE)


@pytest.fixture
def compiled(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that are compiled from now on."""
    if device.type != "cuda":
        pytest.skip("nothing is compiled without a GPU")
    names: list[str] = []
    monkeypatch.setattr(
        importlib.import_module("triton").knobs.runtime,
        "jit_post_compile_hook",
        lambda **about: names.append(about["fn"].name),
    )
    return names

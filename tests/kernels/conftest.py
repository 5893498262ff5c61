"""Kernel tests run on a GPU where there is one, else through Triton's interpreter on the CPU.

Nothing here may import vLLM: the suite also runs on GPU machines that have only torch and Triton.
"""

import importlib

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

"""Where Triton's interpreter does not compute what a GPU does, the tests' patch of it does."""

import importlib
import itertools

import pytest
import torch

from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own casts")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_cast_to_fp8_takes_the_nearest_number(name: str) -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    codes = torch.arange(127, dtype=torch.uint8)  # up to the largest; the next one is NaN
    exact = codes.view(torch.float8_e4m3fn).float()
    between = [
        low + (high - low) * part
        for low, high in itertools.pairwise(exact.tolist())
        for part in (0.25, 0.5, 0.75)
    ]
    dtype = getattr(torch, name)
    numbers = torch.tensor([*exact.tolist(), *between, 1.95, 460.0, 30000.0]).to(dtype)
    numbers = torch.cat([numbers, -numbers])
    bits = numbers.view(torch.int16) if dtype == torch.bfloat16 else numbers
    found = interpreter._convert_float(bits.numpy(), getattr(tl, name), tl.float8e4nv, None)
    cast = torch.from_numpy(found).view(torch.float8_e4m3fn).float()
    distance = (numbers.float().abs()[:, None] - exact).abs()
    assert torch.equal((numbers.float() - cast).abs(), distance.amin(dim=1))

"""What our modules allocate is poisoned in tests; what others allocate is not."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.poison import OURS, no_index, poison

CALLS = {
    "torch.empty(3)": torch.float32,
    "torch.empty(3, dtype=torch.bfloat16)": torch.bfloat16,
    "torch.empty_like(torch.zeros(3))": torch.float32,
    "torch.zeros(3).new_empty((3,))": torch.float32,
    "np.empty(3)": torch.float64,
}


@pytest.mark.parametrize("call", CALLS)
def test_floats_from_our_files_are_nan(call: str) -> None:
    found = torch.as_tensor(_run(call, f"{OURS[1]}/somewhere.py"))
    assert found.dtype == CALLS[call]
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_from_our_files_are_no_index(dtype: str) -> None:
    found = _run(f"torch.empty(3, dtype=torch.{dtype})", f"{OURS[0]}/somewhere.py")
    assert (found == no_index(8 * found.itemsize)).all()
    with pytest.raises(IndexError):
        torch.zeros(10)[found.long()]


def test_other_files_get_what_torch_gives() -> None:
    # Memory that was just let go of is handed out again, or anything else: never all poison.
    found = _run("torch.empty(1 << 16, dtype=torch.int64)", "/usr/lib/elsewhere.py")
    assert (found != no_index(64)).any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_has_a_nan_too(dtype: torch.dtype) -> None:
    memory = torch.zeros(4, dtype=dtype)
    poison(memory)
    assert memory.float().isnan().all()


def _run(call: str, file: str) -> Any:
    return eval(compile(call, file, "eval"), {"torch": torch, "np": np})

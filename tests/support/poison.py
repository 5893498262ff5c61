"""What our own modules allocate without filling is poisoned, so that reading it shows.

Floats become NaN. Integers become a number that is no index of anything, and booleans true. Only
calls from our own files are changed: torch and vLLM work as they always do.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
OURS = (str(REPO / "vllm_kvcompress"), str(REPO / "kernels" / "kvcompress_kernels"))
"""Folders whose allocations are poisoned."""

IN_TORCH = ("empty", "empty_like", "empty_strided", "empty_permuted")
IN_TENSOR = ("new_empty", "new_empty_strided", "resize_")
IN_NUMPY = ("empty", "empty_like")


def no_index(bits: int) -> int:
    """Return a number that no table, slot, page or token has: the largest but a few of its type.

    Sums of two wrap around to negative numbers, so what is computed from it is no index either.
    """
    return (1 << (bits - 1)) - 3


def poison(memory: Tensor) -> None:
    """Overwrite all elements. Mutates the tensor."""
    if memory.dtype == torch.bool:
        memory.fill_(True)
    elif memory.itemsize == 1:
        # All bits set: NaN of both FP8 types, and of every wider float that is kept as bytes.
        memory.view(torch.uint8).fill_(0xFF)
    elif memory.is_floating_point() or memory.is_complex():
        memory.fill_(float("nan"))
    else:
        memory.fill_(no_index(8 * memory.itemsize))


def poison_array(memory: np.ndarray[Any, Any]) -> None:
    """Overwrite all elements of a NumPy array. Mutates it."""
    poison(torch.from_numpy(memory))


def poison_allocations() -> None:
    """From now on poison what our modules allocate in this process; idempotent."""
    if hasattr(torch.empty, "__wrapped__"):
        return
    for owner, names, fill in (
        (torch, IN_TORCH, poison),
        (Tensor, IN_TENSOR, poison),
        (np, IN_NUMPY, poison_array),
    ):
        for name in names:
            setattr(owner, name, _poisoning(getattr(owner, name), fill))


def _poisoning(allocate: Callable[..., Any], fill: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Any:
        memory = allocate(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(OURS):
            fill(memory)
        return memory

    return allocate_poisoned

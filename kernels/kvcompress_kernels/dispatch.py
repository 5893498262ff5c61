"""Which implementation of a kernel runs: Triton on a GPU, torch everywhere else.

Triton is imported when a Triton kernel is first needed, never before: on a machine without it (or
with one that cannot compile) everything that stays on the CPU works.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

from torch import Tensor

Implementation = Literal["auto", "triton", "torch"]
"""``auto``: Triton for tensors on an accelerator, torch on the CPU. The other two force one; on the
CPU Triton's own interpreter (TRITON_INTERPRET=1 before the first use) runs the Triton kernels."""


def use_triton(tensor: Tensor, implementation: Implementation) -> bool:
    """Return whether the Triton kernel runs.

    Args:
        tensor: A tensor on the device of the call.
        implementation: See :data:`Implementation`.

    Raises:
        ValueError: The name of the implementation is unknown.

    """
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f'implementation must be "auto", "triton" or "torch": {implementation!r}')
    if implementation == "auto":
        return tensor.device.type != "cpu"
    return implementation == "triton"


def triton_kernels(name: str) -> ModuleType:
    """Return the module ``kvcompress_kernels.<name>_triton``, imported on first use.

    Args:
        name: Of the module without its ending.

    Raises:
        ImportError: Triton is not installed, or something that it needs.

    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"the Triton kernels of kvcompress_kernels.{name} need Triton, which cannot be "
            f"imported ({error}): install it with 'pip install triton', or keep tensors on the CPU"
        ) from error
    return importlib.import_module(f"kvcompress_kernels.{name}_triton")

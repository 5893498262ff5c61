"""Which implementation of a kernel runs: Triton's on a GPU, the torch twin everywhere else.

Triton is imported when a Triton kernel is first asked for, never before: on a machine without it
(or with one that cannot compile) everything that stays on the CPU works.
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
    """Whether the Triton kernel is the one to run on ``tensor``'s device.

    Raises ValueError for an unknown name.
    """
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f'implementation must be "auto", "triton" or "torch": {implementation!r}')
    if implementation == "auto":
        return tensor.device.type != "cpu"
    return implementation == "triton"


def triton_kernels(name: str) -> ModuleType:
    """The module ``kvcompress_kernels.<name>_triton``, imported on first use.

    Raises ImportError, naming what is missing, where Triton is not installed.
    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"the Triton kernels of kvcompress_kernels.{name} need Triton, which cannot be "
            f"imported ({error}): install it with 'pip install triton', or keep tensors on the CPU"
        ) from error
    return importlib.import_module(f"kvcompress_kernels.{name}_triton")

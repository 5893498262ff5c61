"""Without a GPU the Triton kernels run in Triton's interpreter: imported first in every process."""

import importlib
import importlib.util
import os
import sys
from typing import Any

KERNELS = ("scoring", "selection", "winners", "compaction", "page_tables")


def import_interpreted() -> None:
    """Import the Triton kernels with the interpreter on; the rest of the process keeps it off.

    Triton looks at the variable when a kernel is decorated, that is at import. Engines that tests
    start in this process must not see it. Does nothing where Triton or a GPU's torch is absent.

    Raises:
        RuntimeError: Something has imported Triton before.

    """
    import torch

    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before the kernels; import it in no conftest")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # Triton's interpreter imports this on its first launch, when the variable is off again.
        importlib.import_module("triton.experimental.gluon.language")
        for name in KERNELS:
            importlib.import_module(f"kvcompress_kernels.{name}_triton")
        prepare_once_a_launch()
        cast_to_fp8_as_a_gpu_does()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def prepare_once_a_launch() -> None:
    """Let Triton's interpreter prepare its language once a launch, not at every call within it.

    Each call of a device function looks at all members of ``triton.language`` again, which takes a
    third of the time. Written against Triton 3.9.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def prepare_once(fn: Any) -> Any:
        found = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if found <= prepared:
            return None
        prepared.update(found)
        return prepare(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        prepared.clear()
        try:
            launch(*args, **kwargs)
        finally:
            prepared.clear()

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_anew


def cast_to_fp8_as_a_gpu_does() -> None:
    """Let Triton's interpreter round to FP8 correctly, and saturate. Written against Triton 3.9.

    Its own cast drops the carry of a significand that rounds up (1.95 becomes 1, not 2), is wrong
    below the smallest normal number, and turns what is too large into anything.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    kinds = {
        tl.float32: (np.int32, torch.float32),
        tl.float16: (np.int16, torch.float16),
        tl.bfloat16: (np.int16, torch.bfloat16),
    }

    def convert_float(numbers: Any, given: Any, wanted: Any, rounding_mode: Any) -> Any:
        if wanted != tl.float8e4nv or given not in kinds:
            return convert(numbers, given, wanted, rounding_mode)
        bits, dtype = kinds[given]
        exact = torch.from_numpy(np.array(numbers).view(bits)).view(dtype).float()
        most = torch.finfo(torch.float8_e4m3fn).max
        return exact.clamp(-most, most).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_float

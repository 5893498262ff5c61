"""Without a GPU the Triton kernels run in Triton's interpreter: imported first in every process."""

import importlib
import importlib.util
import os
import sys

KERNELS = ("scoring", "selection", "compaction", "page_tables")


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
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before

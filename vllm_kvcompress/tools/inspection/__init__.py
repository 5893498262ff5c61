"""What a cut kept, as numbers, a picture and a page; no module here imports vLLM."""

from vllm_kvcompress.tools.inspection.data import (
    Inspection,
    Passage,
    Run,
    bin_edges,
    binned,
    passages,
)
from vllm_kvcompress.tools.inspection.pieces import split_text

__all__ = ["Inspection", "Passage", "Run", "bin_edges", "binned", "passages", "split_text"]

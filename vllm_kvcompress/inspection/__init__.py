"""What a cut kept, as numbers, a picture and a page; no module here imports vLLM."""

from .data import Inspection, Passage, Run, bin_edges, binned, passages
from .pieces import split_text

__all__ = ["Inspection", "Passage", "Run", "bin_edges", "binned", "passages", "split_text"]

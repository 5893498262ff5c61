"""The tokens that a cut kept, as numbers, a picture and a page.

No module here but ``run`` imports vLLM.
"""

from vllm_kvcompress.tools.inspection.kept_tokens import (
    Inspection,
    Passage,
    Run,
    bin_edges,
    binned,
    passages,
)
from vllm_kvcompress.tools.inspection.token_texts import split_text

__all__ = ["Inspection", "Passage", "Run", "bin_edges", "binned", "passages", "split_text"]

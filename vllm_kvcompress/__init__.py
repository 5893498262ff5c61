"""KV-cache compression for vLLM: a different number of tokens per layer, memory really freed.

Importing this package imports neither vLLM nor torch; names are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kvcompress.engine.llm import LLM
    from vllm_kvcompress.planning.config import KVCompressionConfig

__all__ = ["LLM", "KVCompressionConfig", "__version__"]
__version__ = "0.1.0"

_LAZY = {
    "LLM": "vllm_kvcompress.engine.llm",
    "KVCompressionConfig": "vllm_kvcompress.planning.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

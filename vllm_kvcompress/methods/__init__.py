"""Compression methods: one small dataclass each, found by name through the registry."""

from vllm_kvcompress.methods.base import (
    END,
    Every,
    LayerInput,
    LayerScores,
    Method,
    Need,
    Schedule,
    to_numbers,
)
from vllm_kvcompress.methods.cake import Cake
from vllm_kvcompress.methods.composed import Composed
from vllm_kvcompress.methods.dynamickv import DynamicKV
from vllm_kvcompress.methods.h2o import H2O
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import Knorm
from vllm_kvcompress.methods.none import NoCompression
from vllm_kvcompress.methods.pyramidkv import PyramidKV
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.registry import available, get_method, register
from vllm_kvcompress.methods.scatter import Scatter
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.methods.streamingllm import StreamingLLM
from vllm_kvcompress.methods.tova import Tova
from vllm_kvcompress.methods.uniform import Uniform

__all__ = [
    "END",
    "H2O",
    "Cake",
    "Composed",
    "DynamicKV",
    "Every",
    "KeyDiff",
    "Knorm",
    "LayerInput",
    "LayerScores",
    "Method",
    "Need",
    "NoCompression",
    "PyramidKV",
    "Random",
    "Scatter",
    "Schedule",
    "SnapKV",
    "StreamingLLM",
    "Tova",
    "Uniform",
    "available",
    "get_method",
    "register",
    "to_numbers",
]

"""Compression methods: one small dataclass each, found by name through the registry."""

from .base import END, Every, LayerInput, LayerScores, Method, Need, Schedule, settled
from .cake import Cake
from .composed import Composed
from .dynamickv import DynamicKV
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .none import NoCompression
from .pyramidkv import PyramidKV
from .random import Random
from .registry import available, get_method, register
from .scatter import Scatter
from .snapkv import SnapKV
from .streamingllm import StreamingLLM
from .tova import Tova
from .uniform import Uniform

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
    "settled",
]

"""Compression methods: one small dataclass each, found by name through the registry."""

from .base import END, Every, LayerInput, LayerScores, Method, Need, Schedule, settled
from .cake import Cake
from .dynamickv import DynamicKV
from .random import Random
from .registry import available, get_method, register
from .scatter import Scatter
from .uniform import Uniform

__all__ = [
    "END",
    "Cake",
    "DynamicKV",
    "Every",
    "LayerInput",
    "LayerScores",
    "Method",
    "Need",
    "Random",
    "Scatter",
    "Schedule",
    "Uniform",
    "available",
    "get_method",
    "register",
    "settled",
]

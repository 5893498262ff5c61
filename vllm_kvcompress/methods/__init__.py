"""Compression methods: pairs of a scorer and an allocator, found by name through the registry.

What is exported here is the interface for methods of other packages (docs/adding-a-method.md).
"""

from vllm_kvcompress.methods.cake import Cake
from vllm_kvcompress.methods.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_odd,
    check_share,
)
from vllm_kvcompress.methods.dynamickv import DynamicKV
from vllm_kvcompress.methods.faults import MethodError
from vllm_kvcompress.methods.h2o import H2O
from vllm_kvcompress.methods.keep_all import NoCompression, Scatter
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import Knorm
from vllm_kvcompress.methods.layer import LayerBatch, LayerInput, LayerScores, Need, to_numbers
from vllm_kvcompress.methods.method import ROLES, Method, MethodSpec
from vllm_kvcompress.methods.parts import (
    Allocator,
    EqualShares,
    Inseparable,
    Scorer,
    StagedDivision,
)
from vllm_kvcompress.methods.pyramidkv import PyramidKV
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.reads import (
    KEY_NEEDS,
    WINDOW_NEEDS,
    all_keys,
    attention_statistics,
    observe,
    once_per_layer,
    queries_and_keys,
    score_keys,
    window_votes,
)
from vllm_kvcompress.methods.registry import (
    METHOD_API,
    available,
    get_method,
    get_spec,
    register,
)
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.methods.streamingllm import StreamingLLM
from vllm_kvcompress.methods.tova import Tova
from vllm_kvcompress.methods.uniform import Uniform

__all__ = [
    "H2O",
    "KEY_NEEDS",
    "METHOD_API",
    "ROLES",
    "WINDOW_NEEDS",
    "Allocator",
    "Cake",
    "DynamicKV",
    "EqualShares",
    "Inseparable",
    "KeyDiff",
    "Knorm",
    "LayerBatch",
    "LayerInput",
    "LayerScores",
    "Method",
    "MethodError",
    "MethodSpec",
    "Need",
    "NoCompression",
    "PyramidKV",
    "Random",
    "Scatter",
    "Scorer",
    "SnapKV",
    "StagedDivision",
    "StreamingLLM",
    "Tova",
    "Uniform",
    "all_keys",
    "attention_statistics",
    "available",
    "check_bool",
    "check_choice",
    "check_int",
    "check_number",
    "check_odd",
    "check_share",
    "get_method",
    "get_spec",
    "observe",
    "once_per_layer",
    "queries_and_keys",
    "register",
    "score_keys",
    "to_numbers",
    "window_votes",
]

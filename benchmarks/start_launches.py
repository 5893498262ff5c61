"""All launches of a server's warm-up for a model's shape, on the CPU and without running them.

What is launched comes from the code that serves, so it is complete whatever kernels there are.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import vllm_kvcompress.methods  # noqa: F401 - they are to be found by _launch_on_cpu
from kvcompress_kernels.dispatch import use_triton
from vllm_kvcompress.eviction.compressor import Compressor
from vllm_kvcompress.eviction.cut_reporter import CutReporter
from vllm_kvcompress.paging.arena import PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.device_page_tables import DeviceTableBuilder
from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.paging.strided_codec import StridedPageCodec
from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver

BLOCK = 16
ALLOW_ALL = {"method": True, "budget": {"min": 1}, "params": True, "keep": True, "decode": True}


@dataclass(frozen=True)
class AttentionShape:
    """A model's attention: layers L, query heads H, KV heads N, head size D, and the rest."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: str = "auto"
    soft_cap: float = 0.0
    sinks: bool = False


class WarmedWorker:
    """What a GPU's worker has of ours, on the CPU.

    Args:
        shape: The model's attention.
        config: The server's settings.
        max_model_len: Tokens of the longest prompt.
        num_blocks: Blocks of the pool.

    """

    def __init__(
        self,
        shape: AttentionShape,
        config: dict[str, Any],
        *,
        max_model_len: int = 3000,
        num_blocks: int = 420,
    ) -> None:
        engine = EngineLimits(num_layers=shape.layers, one_step_tokens=2048)
        self.resolver = SettingsResolver(KVCompressionConfig.parse(config), BLOCK, engine)
        self.shape, self.max_model_len = shape, max_model_len
        origin = np.arange(shape.layers, dtype=np.int64) * num_blocks
        self.arena = PageArena(PageGeometry(origin, 1, num_blocks, BLOCK))
        pool = (shape.layers * num_blocks, BLOCK, shape.kv_heads, 2 * shape.head_size)
        stored = torch.uint8 if shape.cache_dtype.startswith("fp8") else shape.dtype
        cache = torch.zeros(pool, dtype=stored).transpose(1, 2)
        sinks = torch.zeros(shape.heads) if shape.sinks else None
        layer = AttentionParams(shape.head_size**-0.5, shape.soft_cap, sinks)
        self.compressor = Compressor(
            self.arena,
            StridedPageCodec(cache, shape.cache_dtype, shape.dtype),
            [layer] * shape.layers,
            CutReporter(False, BLOCK),
        )
        self.tables = DeviceTableBuilder(
            self.arena,
            TableLimits(rows=7, width=num_blocks, tokens=2049),
            torch.device("cpu"),
            implementation="triton",
        )

    def warm_up(self) -> None:
        """Launch what a session launches at the start (``Session.warm_up``)."""
        query_shape = (self.shape.heads, self.shape.head_size)
        methods = self.resolver.possible_methods()
        self.compressor.warm_up(methods, query_shape, self.shape.dtype, self.max_model_len)
        self.tables.warm_up()


@contextmanager
def observed(kernel_type: Any, seen: Callable[..., Any]) -> Iterator[None]:
    """Give every launch to ``seen`` instead of running it; results of kernels are zeros.

    Args:
        kernel_type: ``triton.runtime.JITFunction``, or ``InterpretedFunction``.
        seen: Called with the kernel and the arguments of the launch.

    """
    before: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def on_cpu(_: Any, implementation: str) -> bool:
        return implementation != "torch"

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen(kernel, args, kwargs)

    for name, module in list(sys.modules.items()):
        own = name.split(".")[0] in ("kvcompress_kernels", "vllm_kvcompress")
        if own and getattr(module, "use_triton", None) is use_triton:
            put(module, "use_triton", on_cpu)
    put(torch, "empty", torch.zeros)
    put(torch, "empty_like", torch.zeros_like)
    put(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    put(kernel_type, "run", run)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

"""How often a cut has a GPU do something: kernels launched, uploads, waits of the host.

    python -m benchmarks.count_cut_launches [--json] [--methods cake,dynamickv] [--prompts 1,4,16]

Nothing runs: tensors are on torch's meta device, Triton's launches are replaced by a counter, and
what the host fetches are random numbers. Llama-3.1-8B's shape: 32 layers, 32 query heads, 8 KV
heads, prompts of 8192 tokens, budget 1024, and in decode cuts 128 tokens more than that.

* **aten**: operations of torch on the device, but for views and allocations;
* **triton**: launches of our kernels;
* **uploads**: copies from the host to the device;
* **syncs**: copies from the device to the host, for which the host waits.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernel_bench import LLAMA_3_1_8B, Shape
from vllm_kvcompress.eviction.compressor import Compressor
from vllm_kvcompress.eviction.cut_reporter import CutReporter
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.shared_cuts import DueCut
from vllm_kvcompress.paging.arena import PageArena, PageGeometry
from vllm_kvcompress.paging.attention_layer import AttentionParams
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.paging.strided_codec import StridedPageCodec
from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver

TOKENS, BUDGET, BUFFER = 8192, 1024, 128
BLOCKS = 40_000
KINDS = ("prompt", "decode", "cascade")
DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Counts:
    """What one or several cuts of one step made the host ask of the device."""

    aten: int
    triton: int
    uploads: int
    syncs: int

    @property
    def launches(self) -> int:
        """Kernels of any kind; copies are apart."""
        return self.aten + self.triton


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations on the meta device would have a GPU do.

    Attributes:
        found: Times by operation; "upload" and "sync" are copies between host and device.

    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self._random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = _tensors((args, kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        reads = any(tensor.device == DEVICE for tensor in given)
        if name == "_local_scalar_dense" and reads:
            self.found["sync"] += 1
            return 0
        if name == "_to_copy" and reads and (kwargs or {}).get("device") == torch.device("cpu"):
            self.found["sync"] += 1
            # Numbers that differ, so that the layers get different budgets.
            shape, dtype = given[0].shape, given[0].dtype
            return (1000 * torch.rand(shape, generator=self._random, dtype=torch.float64)).to(dtype)
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        if not reads and not any(tensor.device == DEVICE for tensor in made):
            return result  # the host's own
        if name in ("_to_copy", "copy_") and given[-1].device != DEVICE:
            self.found["upload"] += 1
        elif "empty" not in name and not _is_view(func):
            self.found[f"aten::{name}"] += 1
        return result


def counting() -> LaunchCounter:
    """Return a context that counts; Triton's launches do nothing from now on in this process."""
    from triton.runtime.jit import JITFunction

    mode = LaunchCounter()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        mode.found[f"triton::{kernel.fn.__name__}"] += 1

    JITFunction.run = launch
    return mode


def count(
    method: str, kind: str, prompts: int, shape: Shape = LLAMA_3_1_8B, tokens: int = TOKENS
) -> Counter[str]:
    """Count what cuts of one step take, by operation.

    Args:
        method: Of all requests.
        kind: Of :data:`KINDS`; requests are cut in "prompt" and "decode" for the second time, so
            that nothing counts that is done once.
        prompts: Number of requests that are cut in this step.
        shape: The model's.
        tokens: Of each prompt.

    """
    engine = _Engine(method, shape, tokens)
    requests = {f"r{number}": engine.request(number) for number in range(prompts)}
    if kind == "cascade":
        with counting() as counter:
            for name, request in requests.items():
                engine.cascade(name, request)
        return counter.found
    with counting() as counter:
        engine.cut(requests)
    if kind == "decode":
        for _ in range(2):
            engine.generate(requests)
            counter.found.clear()
            with counter:
                engine.cut(requests)
    return counter.found


def totals(found: Counter[str]) -> Counts:
    """Sum up what was counted."""
    return Counts(
        aten=sum(n for name, n in found.items() if name.startswith("aten::")),
        triton=sum(n for name, n in found.items() if name.startswith("triton::")),
        uploads=found["upload"],
        syncs=found["sync"],
    )


class _Engine:
    """What of an engine makes cuts."""

    def __init__(self, method: str, shape: Shape, tokens: int) -> None:
        settings = {"method": method, "budget": BUDGET}
        decode = {"decode_budget": BUDGET, "decode_buffer": BUFFER}
        limits = EngineLimits(num_layers=shape.layers, one_step_tokens=tokens, lag=1, alone=True)
        self._shape, self._tokens = shape, tokens
        self._size = shape.block_size
        self._resolver = SettingsResolver(
            KVCompressionConfig.parse({**settings, **decode}), shape.block_size, limits
        )
        origin = np.arange(shape.layers, dtype=np.int64) * BLOCKS
        self._arena = PageArena(PageGeometry(origin, 1, BLOCKS, shape.block_size))
        pool = (shape.layers * BLOCKS, shape.block_size, shape.kv_heads, 2 * shape.head_size)
        flat = torch.empty(pool, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
        params = AttentionParams(shape.head_size**-0.5, 0.0, None)
        reporter = CutReporter(False, shape.block_size)
        self._compressor = Compressor(
            self._arena,
            StridedPageCodec(flat, "auto", torch.bfloat16),
            [params] * shape.layers,
            reporter,
        )
        self._next_block = 1

    def request(self, number: int) -> WorkerRequest:
        """A request whose prompt runs in this step; a few tokens shorter for each number."""
        length = self._tokens - 16 * number
        settings = self._resolver.resolve(None, length)
        request = WorkerRequest(
            prompt_len=length,
            settings=settings,
            schedule=settings.schedule(length),
            blocks=self._blocks(cdiv(length, self._size) + BUDGET // self._size),
            computed=0,
            scheduled=length,
        )
        request.window = self._window(request)
        return request

    def cut(self, requests: dict[str, WorkerRequest]) -> None:
        """Make the requests' next cuts, as after a step."""
        self._compressor.cut_all(
            [DueCut(name, request, request.window) for name, request in requests.items()]
        )

    def generate(self, requests: dict[str, WorkerRequest]) -> None:
        """Let requests come to their next decode cut."""
        for name, request in requests.items():
            new = self._blocks(BUFFER // self._size)
            request.blocks += new
            self._arena.grow({name: new})
            request.window = self._window(request)

    def cascade(self, name: str, request: WorkerRequest) -> None:
        """Cut a prompt layer by layer."""
        planner = request.settings.planner
        request.prefill_blocks = planner.cascade_prefill_blocks(request.prompt_len)
        cascade = self._compressor.begin_cascade(name, request)
        for layer in range(self._shape.layers):
            cascade.cut_layer(layer, None)
        cascade.finish()

    def _blocks(self, number: int) -> list[int]:
        first, self._next_block = self._next_block, self._next_block + number
        return list(range(first, first + number))

    def _window(self, request: WorkerRequest) -> Tensor | None:
        planner, shape = request.settings.planner, self._shape
        if not planner.needs_queries:
            return None
        size = (shape.layers, planner.window, shape.heads, shape.head_size)
        return torch.empty(size, dtype=torch.bfloat16, device=DEVICE)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [tensor for part in found for tensor in _tensors(part)]
    return []


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)


def main() -> None:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default="cake,snapkv,dynamickv")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--prompts", default="1,4,16")
    parser.add_argument("--json", action="store_true", help="one object a line, with operations")
    args = parser.parse_args()
    if not args.json:
        print("| method | cut | prompts | aten | triton | uploads | syncs |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for method in args.methods.split(","):
        for kind in args.kinds.split(","):
            for prompts in map(int, args.prompts.split(",")):
                found = count(method, kind, prompts)
                sums = totals(found)
                row = (method, kind, prompts, *asdict(sums).values())
                if args.json:
                    about = {"method": method, "cut": kind, "prompts": prompts, **asdict(sums)}
                    print(json.dumps({**about, "operations": dict(found.most_common())}))
                else:
                    print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()

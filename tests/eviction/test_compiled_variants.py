"""No request waits for a compiler: what serving launches, the warm-up has launched before.

Kernels are told apart as Triton tells them apart (``compiler_keys.py``) and do not run, so models
have their real shapes. Which kernels there are is not said here: whatever is launched counts.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.start_launches import ALLOW_ALL, BLOCK, AttentionShape, WarmedWorker, observed
from tests.support.compiler_keys import key_of
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.eviction.shared_cuts import DueCut
from vllm_kvcompress.methods import available
from vllm_kvcompress.paging.page_tables import BatchRows
from vllm_kvcompress.paging.rounding import cdiv

MODELS = {
    "llama": AttentionShape(6, 32, 8, 128),
    "qwen2.5-0.5b": AttentionShape(5, 14, 2, 64),
    "smollm2": AttentionShape(7, 9, 3, 64),
    "72 wide, fp16": AttentionShape(3, 9, 3, 72, torch.float16),
}


class Worker(WarmedWorker):
    """It serves requests, too."""

    def serve(self, prompt_len: int, extra: dict[str, Any], *, cascade: bool) -> int:
        """One request: its prompt's cuts, two while it generates, and a step's tables.

        Returns:
            Cuts that were made.

        """
        settings = self.resolver.resolve(extra, prompt_len)
        schedule = settings.schedule(prompt_len)
        if schedule is None:
            return 0
        planner = settings.planner
        first = schedule.cut(1)
        prefill = planner.cascade_prefill_blocks(prompt_len) if cascade else None
        own = cdiv(first.position, BLOCK) if prefill is None else prefill
        blocks = list(range(1, own + 1))
        request = WorkerRequest(prompt_len, settings, schedule, blocks, 0, prefill_blocks=prefill)
        for number in range(1, 4):
            cut = request.next_cut
            if cut is None:
                break
            tail = cut.position - schedule.cut(number - 1).position if number > 1 else 0
            count = cdiv(tail, BLOCK) + (cut.blocks if cut.moves else 0)
            new = range(len(request.blocks) + 1, len(request.blocks) + count + 1)
            request.blocks.extend(new)
            if number > 1:
                self.arena.grow({"r": list(new)})
            rows = planner.window if request.next_is_prefill_cut else planner.decode_window
            shape = (self.shape.layers, rows, self.shape.heads, self.shape.head_size)
            window = torch.zeros(shape, dtype=self.shape.dtype) if planner.needs_queries else None
            if number == 1 and prefill is not None:
                request.window = window
                running = self.compressor.begin_cascade("r", request)
                for layer in range(self.shape.layers):
                    running.cut_layer(layer, None)
                running.finish()
            else:
                self.compressor.cut_all([DueCut("r", request, window)])
        self._build_tables(prompt_len)
        self.arena.drop("r")
        return request.cuts_made

    def _build_tables(self, length: int) -> None:
        lengths = torch.tensor([5, length, 9], dtype=torch.int32)
        self.tables.build(
            BatchRows(
                block_table=torch.zeros(8, 420, dtype=torch.int32)[1:4],
                seq_lens=lengths,
                query_start=torch.arange(4, dtype=torch.int32),
                slot_mapping=torch.zeros(3, dtype=torch.int64),
                rows=np.array([1]),
                slots=self.arena.slots(["r"]),
                seq_lens_bound=None,
            )
        )


@pytest.fixture
def launched() -> Iterator[set[str]]:
    """Keys of what is launched; outputs of kernels are zeros."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    keys: set[str] = set()

    def note(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keys.add(key_of(kernel, args, kwargs))

    with observed(interpreter.InterpretedFunction, note):
        yield keys


def requests(number: int, policy: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """Prompts of many lengths with all that the policy allows."""
    source = random.Random(0)
    names = [n for n in available() if n not in ("none", "scatter")]
    for index in range(number):
        name = names[index % len(names)]
        prompt = source.choice([*range(200, 260), *range(1000, 1160), *range(2040, 2060), 2999])
        extra: dict[str, Any] = {"kv_compression": name}
        if policy is ALLOW_ALL:
            extra["kv_compression_budget"] = source.choice([160, 161, 0.3])
            params: dict[str, Any] = {"window": source.randint(2, 128)}
            if name in ("snapkv", "dynamickv", "pyramidkv"):
                params["pooling"] = source.choice(["avg", "max"])
                params["reduce"] = source.choice(["mean", "max"])
            if name in ("cake", "snapkv", "uniform", "dynamickv"):
                params["kernel"] = source.choice([1, 3, 5, 7, 11, 63, 129])
            if name == "dynamickv":
                params["compare"] = source.choice(["background", "mass"])
                params["every"] = source.choice([1, 2, 3])
            if name == "dynamickv" and index % 4 == 0:
                params = {"faithful": True}
                extra["kv_compression_decode"] = 0
            extra["kv_compression_config"] = params
        yield prompt, extra


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize(
    ("method", "policy"),
    [("cake", None), ("none", None), ("none", ALLOW_ALL)],
    ids=lambda value: "all" if value is ALLOW_ALL else str(value),
)
def test_what_is_launched_was_launched_at_the_start(
    launched: set[str], shape: str, method: str, policy: Any
) -> None:
    """Every allowed method, window and pooling, at lengths that are no multiple of anything."""
    config: dict[str, Any] = {"method": method, "budget": 160, "decode_budget": 192}
    config |= {"decode_buffer": 128}
    if policy is not None:
        config["allow"] = policy
    worker = Worker(MODELS[shape], config)
    worker.warm_up()
    warm = set(launched)
    assert warm
    launched.clear()
    cuts = 0
    for number, (prompt, extra) in enumerate(requests(44 if policy else 22, policy)):
        cuts += worker.serve(prompt, extra, cascade=number % 3 == 0)
    assert cuts > 40
    assert launched - warm == set()


def test_nothing_is_compiled_for_where_a_tensor_begins(launched: set[str]) -> None:
    """But for the pool and the windows, which always begin at a multiple of 16 bytes.

    Others are parts of larger tensors at times, and where those begin depends on a prompt.
    """
    Worker(MODELS["llama"], {"method": "none", "allow": ALLOW_ALL}).warm_up()
    found = {name for key in launched for name in re.findall(r"(\w+)=\('\*\w+', 'D'\)", key)}
    assert found == {"queries", "cache", "words"}


def test_a_start_compiles_as_many_variants_as_the_page_says(launched: set[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
    page = " ".join(path.read_text(encoding="utf-8").split())
    said = re.search(r"default policy compiles (\d+) variants, .* set everything (\d+) \(", page)
    assert said is not None
    counts = []
    for config in ({"method": "cake"}, {"method": "none", "allow": ALLOW_ALL}):
        launched.clear()
        Worker(MODELS["llama"], {"budget": 160, **config}).warm_up()
        counts.append(str(len(launched)))
    assert counts == list(said.groups())

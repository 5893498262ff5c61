"""What a cut takes of the device's memory, against what is set aside for it."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.start_launches import AttentionShape, WarmedWorker, observed
from vllm_kvcompress.planning.workspace_memory import ModelShape, workspace_bytes


class Peak(TorchDispatchMode):
    """Follows the storages that tensors made within it share; ``most`` is their peak in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._users: Counter[int] = Counter()
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        return made

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._users[key]:
            self._held += size
            self.most = max(self.most, self._held)
        self._users[key] += 1

        def gone() -> None:
            self._users[key] -= 1
            if not self._users[key]:
                self._held -= size

        weakref.finalize(tensor, gone)


@pytest.mark.parametrize(
    "params",
    [
        {"method": "cake", "faithful": True},
        {"method": "dynamickv", "faithful": True},
        {"method": "tova", "window": 8},
        {"method": "cake"},
        {"method": "keydiff"},
    ],
    ids=str,
)
def test_a_cut_of_the_longest_prompt_takes_no_more_than_was_set_aside(
    params: dict[str, Any],
) -> None:
    tokens, shape = 16000, AttentionShape(2, 32, 8, 128)
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    worker = WarmedWorker(
        shape, {**params, "budget": 512}, max_model_len=tokens, num_blocks=tokens // 16
    )
    sizes = ModelShape(shape.layers, shape.heads, shape.kv_heads, shape.head_size, 2)
    _, transient = workspace_bytes(
        worker.resolver,
        sizes,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        max_model_len=tokens,
    )
    with observed(interpreter.InterpretedFunction, lambda *_: None), Peak() as peak:
        worker.warm_up()
    assert peak.most > 60 << 20
    assert peak.most <= transient

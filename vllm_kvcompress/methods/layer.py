"""What a method is given of a layer, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics


class Need(Enum):
    """What the engine must collect during prefill for a method."""

    WINDOW_QUERIES = auto()
    KEYS = auto()


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """One layer of one request at the end of its prefill, or at a later cut.

    Attributes:
        layer: 0-based number among the layers that are compressed.
        num_layers: Number of layers that are compressed.
        num_tokens: S, tokens that the layer holds.
        window: w, tokens at their end that are always kept.
        num_kv_heads: N.
        base: C - w, history tokens that an average layer is to keep.
        queries: [H, m, D], the last m <= window queries after RoPE, in the model's dtype; None
            unless the method needs them.
        keys: [N, S, D], all keys after RoPE; None where ``read_keys`` gives them.
        scale: Factor on the products of ``queries`` and ``keys``; includes a quantized cache's
            scales.
        soft_cap: tanh cap of the logits, 0 if there is none.
        sinks: [H], extra softmax logits, or None.
        read_keys: Reads ``keys`` out of the cache, in the model's dtype, or as the cache's numbers
            if it is quantized; None unless the method needs keys.
        observe: Returns the statistics of the window's attention from a kernel that reads the
            pages in place; None where they have to come from queries and keys.
        reads: What :func:`~vllm_kvcompress.methods.reads.once_per_layer` keeps; starts empty.

    """

    layer: int
    num_layers: int
    num_tokens: int
    window: int
    num_kv_heads: int
    base: int
    queries: Tensor | None
    keys: Tensor | None
    scale: float
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    read_keys: Callable[[], Tensor] | None = None
    observe: Callable[[], WindowStatistics] | None = None
    reads: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def history(self) -> int:
        """S' = S - w, the tokens that may be evicted."""
        return self.num_tokens - self.window


@dataclass(frozen=True)
class LayerScores:
    """What a method says about a layer.

    Attributes:
        tokens: fp32 [N, S'], the worth of every history token for every KV head; higher is kept.
        stats: What the allocator's ``weights`` reads of the layer besides: numbers, 0-dim tensors,
            which may wait on their device until :func:`to_numbers` fetches them, and seldom larger
            tensors (the faithful DynamicKV's scores per query head).

    """

    tokens: Tensor
    stats: Mapping[str, float | Tensor] = field(default_factory=dict)

    def stat(self, name: str) -> float:
        """Return one of ``stats`` as a number; waits for the device if it is a tensor."""
        return float(self.stats[name])


def _waits(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def to_numbers(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """Return the same scores with 0-dim ``stats`` as numbers, fetched in one transfer."""
    waiting = [torch.as_tensor(v).double() for s in scores for v in s.stats.values() if _waits(v)]
    if not waiting:
        return list(scores)
    numbers = iter(torch.stack(waiting).tolist())
    return [
        replace(s, stats={k: next(numbers) if _waits(v) else v for k, v in s.stats.items()})
        for s in scores
    ]

"""What a method is given of a layer, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from kvcompress_kernels.scoring import PagedStatistics, WindowStatistics


class Need(Enum):
    """What the engine must collect during prefill for a method."""

    WINDOW_QUERIES = auto()
    KEYS = auto()


@dataclass(frozen=True)
class LayerBatch:
    """Layers that were observed in one launch: those of one request, or of several.

    Attributes:
        statistics: Of all of them.
        handed: What :meth:`read` has computed; starts empty.

    """

    statistics: PagedStatistics
    handed: dict[Any, tuple[Tensor, set[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def read(self, name: Any, job: int, compute: Callable[[PagedStatistics], Tensor]) -> Tensor:
        """Return what one layer asks for, computed for all of them when the first one asks.

        Every call returns memory that no other call has: whoever asks may change it.

        Args:
            name: Says what is computed, and from which arguments.
            job: The layer's place in the batch.
            compute: Computes it for all, first dimension the jobs. Mutates this.

        """
        found, taken = self.handed.get(name, (None, set()))
        if found is None or job in taken:
            found, taken = compute(self.statistics), set()
            self.handed[name] = found, taken
        taken.add(job)
        return found[job]


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
        batch: The layers that ``observe`` has observed along with this one; None: only this.
        job: Place in ``batch``.
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
    batch: LayerBatch | None = None
    job: int = 0
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
        reads: What an allocator keeps of the layer between divisions; starts empty.

    """

    tokens: Tensor
    stats: Mapping[str, float | Tensor] = field(default_factory=dict)
    reads: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stat(self, name: str) -> float:
        """Return one of ``stats`` as a number; waits for the device if it is a tensor."""
        return float(self.stats[name])


def _waits(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def to_numbers(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """Return the same scores with 0-dim ``stats`` as numbers, fetched in one transfer."""
    waiting = [torch.as_tensor(v) for s in scores for v in s.stats.values() if _waits(v)]
    if not waiting:
        return list(scores)
    numbers = iter(_fetch(waiting))
    return [
        replace(s, stats={k: next(numbers) if _waits(v) else v for k, v in s.stats.items()})
        for s in scores
    ]


def _fetch(waiting: Sequence[Tensor]) -> list[float]:
    """Numbers of 0-dim tensors; entries of one vector are fetched as the stretch they lie in."""
    vectors: dict[Any, list[Tensor]] = {}
    for value in waiting:
        vectors.setdefault((value.untyped_storage()._cdata, value.dtype), []).append(value)
    stretches, places, end = [], {}, 0
    for values in vectors.values():
        at = [int(value.storage_offset()) for value in values]
        first, size = min(at), max(at) - min(at) + 1
        if size <= 2 * len(values):
            stretches.append(values[0].as_strided((size,), (1,), first).double())
        else:
            first, size = 0, len(values)
            at = list(range(size))
            stretches.append(torch.stack(values).double())
        for value, place in zip(values, at, strict=True):
            places[id(value)] = end + place - first
        end += size
    if len({stretch.device for stretch in stretches}) > 1:  # some methods keep theirs on the host
        stretches = [stretch.cpu() for stretch in stretches]
    whole = stretches[0] if len(stretches) == 1 else torch.cat(stretches)
    numbers: list[float] = whole.tolist()
    return [numbers[places[id(value)]] for value in waiting]

"""What a compression method is: what it reads, how it scores tokens, how layers compare.

A method is a small frozen dataclass whose fields are its user-visible parameters. It sees one
request and one layer at a time and never the engine: scores of a request cannot depend on what
else is in the batch.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcompress_kernels.dispatch import use_triton
from kvcompress_kernels.scoring import WindowStatistics
from kvcompress_kernels.selection import select_tokens, top_tokens


class Need(Enum):
    """What the engine must collect during prefill for a method."""

    WINDOW_QUERIES = auto()
    KEYS = auto()


@dataclass(frozen=True)
class Schedule:
    """After which layers the pool is divided and earlier layers are cut.

    The last layer is always a cut. Use ``Every(m)`` or ``END``.
    """

    def cuts_after(self, count: int, num_layers: int) -> bool:
        """Whether there is a cut once ``count`` of ``num_layers`` layers have been seen."""
        return count == num_layers


@dataclass(frozen=True)
class Every(Schedule):
    """A cut after every ``m`` layers, and after the last."""

    m: int

    def __post_init__(self) -> None:
        if self.m < 1:
            raise ValueError(f"a schedule needs a cut every 1 or more layers, got {self.m}")

    def cuts_after(self, count: int, num_layers: int) -> bool:
        return count % self.m == 0 or count == num_layers


END = Schedule()
"""One cut, after the last layer."""


@dataclass(frozen=True)
class LayerInput:
    """One layer of one request at the end of its prefill.

    ``layer``: 0-based number among the ``num_layers`` that are compressed. ``num_tokens``: S, the
    prompt's length. ``base``: C - w, history tokens of an average layer. ``queries``: [H, m, D],
    the last m <= window queries after RoPE, in the model's dtype; None unless the method declares
    the need. ``keys``: [N, S, D], all keys after RoPE, or None with ``read_keys``, which reads them
    out of the cache (in the model's dtype, or the cache's values if that is quantized).
    ``observe``: returns the statistics of the window's attention from a kernel that reads the pages
    in place; None where the queries and keys have to do. ``scale``: factor on the dot products of
    ``queries`` and ``keys`` (a quantized cache's scales are part of it). ``soft_cap``: tanh cap of
    the logits, 0 if none. ``sinks``: [H] extra softmax logits, or None.
    """

    layer: int
    num_layers: int
    num_tokens: int
    num_kv_heads: int
    base: int
    queries: Tensor | None
    keys: Tensor | None
    scale: float
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    read_keys: Callable[[], Tensor] | None = None
    observe: Callable[[], WindowStatistics] | None = None


@dataclass(frozen=True)
class LayerScores:
    """What a method keeps of a layer.

    ``tokens``: fp32 [N, S'], worth of every history token for every KV head, higher is kept.
    ``stats``: scalars of the layer its method's ``weights`` reads (CAKE: ``log_entropy`` and
    ``log_shift``, natural logarithms, -inf for zero). ``score`` may leave them on the device as
    0-dim tensors; :func:`to_numbers` makes numbers of all layers' at once before ``weights`` runs.
    ``query_heads``: fp32 [H, S'], only where a faithful mode must count per query head.
    """

    tokens: Tensor
    stats: Mapping[str, float | Tensor] = field(default_factory=dict)
    query_heads: Tensor | None = None

    def stat(self, name: str) -> float:
        """One of ``stats`` as a number; of a tensor that waits for its device."""
        return float(self.stats[name])


def to_numbers(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """The same scores with all ``stats`` as numbers, fetched from the device in one transfer."""
    waiting = [value for s in scores for value in s.stats.values() if isinstance(value, Tensor)]
    if not waiting:
        return list(scores)
    numbers = iter(torch.stack([value.double() for value in waiting]).tolist())
    return [
        replace(
            s,
            stats={k: next(numbers) if isinstance(v, Tensor) else v for k, v in s.stats.items()},
        )
        for s in scores
    ]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. The last ``window`` tokens of a prompt are always kept.

    A method has two parts, and a composition (:class:`.composed.Composed`) takes them from two
    methods:

    * the *scorer* says what each token is worth: ``needs``, ``window``,
      ``uses_window_statistics``, ``score``, ``select``, ``select_layers``,
      ``budgets_are_nested``, ``stores_by_worth``, ``token_by_token``;
    * the *allocator* says how layers share the pool, and when: ``allocator_needs``,
      ``layer_stats``, ``budgets_ignore_scores``, ``ratios_are_fixed``, ``schedule``, ``weights``,
      ``cap``, ``floor``.

    What ties them together within one method: ``score`` returns the allocator's ``layer_stats``
    along with the tokens, so that both can come from one look at the window.

    Sub-classes set ``name`` and ``needs``, add their parameters as fields, check them in
    ``__post_init__`` (after ``super().__post_init__()``) and raise ValueError in one sentence that
    names the method, the field, the allowed range and the value.
    """

    name: ClassVar[str]
    keeps_all: ClassVar[bool] = False
    """Nothing is ever evicted: the engine only moves tokens about and never calls ``score``."""

    scorer_params: ClassVar[frozenset[str]] = frozenset()
    """Parameters that only the scorer reads: refused where another method scores."""
    allocator_params: ClassVar[frozenset[str]] = frozenset()
    """Parameters that only the allocator reads: refused where another method allocates."""

    window: int = 32

    def __post_init__(self) -> None:
        self._check_int("window", 1)

    @property
    def composable(self) -> bool:
        """Whether a composition may take a part of this method.

        Not where nothing is scored, nor where scores and budgets only make sense together.
        """
        return not (self.keeps_all or self.token_by_token)

    # --- scorer ----------------------------------------------------------------------------------

    needs: ClassVar[frozenset[Need]]
    """What the method reads, its allocator's part included."""

    @property
    def uses_window_statistics(self) -> bool:
        """Whether ``score`` works from ``LayerInput.observe``; else it is given keys to read.

        The same goes for ``layer_stats``.
        """
        return False

    @abstractmethod
    def score(self, layer: LayerInput) -> LayerScores:
        """Score the history of one layer; S' = num_tokens - window must be at least 1.

        ``stats`` of the result are those of :meth:`layer_stats`.
        """

    def select(self, scores: LayerScores, count: int) -> Tensor:
        """The history tokens a layer keeps: int64 [N, count], ascending ids, each once a head."""
        return top_tokens(scores.tokens, count)

    def select_layers(self, scores: Sequence[LayerScores], counts: Sequence[int]) -> list[Tensor]:
        """``select`` for several layers of one prompt, on an accelerator in one launch."""
        alike = len({s.tokens.shape for s in scores}) == 1
        if not (self.budgets_are_nested and alike and use_triton(scores[0].tokens, "auto")):
            return [self.select(s, count) for s, count in zip(scores, counts, strict=True)]
        ids = select_tokens(torch.stack([s.tokens for s in scores]), counts)
        return [ids[layer, :, :count] for layer, count in enumerate(counts)]

    @property
    def budgets_are_nested(self) -> bool:
        """Whether a layer keeps among its tokens, with a smaller budget, the best of those.

        A cascade cuts a layer again and again and needs it to be so, as :meth:`select` has it.
        """
        return type(self).select is Method.select

    @property
    def stores_by_worth(self) -> bool:
        """Whether survivors lie in the order of their scores, best first, instead of the text's.

        It decides what are neighbours when scores are pooled at a later cut.
        """
        return False

    @property
    def token_by_token(self) -> bool:
        """Whether cuts while generating are made after each token, judged by its query alone.

        If not, they are made every so many tokens and judged by the last ``window`` queries.
        """
        return False

    # --- allocator -------------------------------------------------------------------------------

    allocator_needs: ClassVar[frozenset[Need]] = frozenset()
    """The part of ``needs`` that ``layer_stats`` reads."""
    budgets_ignore_scores: ClassVar[bool] = False
    """``weights`` does not look at scores: a layer's budget is known before any layer has run."""

    def layer_stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        """What ``weights`` reads of a layer beyond its tokens' scores; see ``LayerScores.stats``.

        Called only in a composition, where another method scores the tokens.
        """
        return {}

    @property
    def ratios_are_fixed(self) -> bool:
        """Whether two layers' weights keep their ratio when further layers are seen.

        A cascade of cuts then ends exactly where a single one does, which is cheaper to make.
        """
        return False

    @property
    def schedule(self) -> Schedule:
        """When layers are cut; by default once, after the last."""
        return END

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        """Relative budgets of the layers seen so far, fp64 [len(seen)], finite and >= 0.

        All zero means an even split. By default all layers are equal.
        """
        return np.ones(len(seen), dtype=np.float64)

    def cap(self, history: int, base: int) -> int:
        """Most history tokens one layer may keep, of ``history`` there are."""
        return history

    def floor(self, history: int, base: int) -> int:
        """Fewest history tokens a layer is given before the rest is divided."""
        return 0

    # --- checks of parameters --------------------------------------------------------------------

    def _check_int(self, field_name: str, low: int) -> None:
        value = getattr(self, field_name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self._refuse(field_name, f"an integer of at least {low}")

    def _check_odd(self, field_name: str) -> None:
        value = getattr(self, field_name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
            self._refuse(field_name, "an odd integer of at least 1")

    def _check_number(
        self, field_name: str, low: float, *, above: bool = False, optional: bool = False
    ) -> None:
        """A finite number >= ``low``, or > ``low`` if ``above``; or None if ``optional``."""
        value = getattr(self, field_name)
        if optional and value is None:
            return
        good = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max  # not inf or nan, nor an integer beyond floats
            and (value > low if above else value >= low)
        )
        if not good:
            self._refuse(field_name, f"a number {'above' if above else 'of at least'} {low:g}")

    def _check_share(self, field_name: str) -> None:
        """A number above 0 and below 1."""
        value = getattr(self, field_name)
        if not (isinstance(value, float) and 0.0 < value < 1.0):
            self._refuse(field_name, "a number above 0 and below 1")

    def _check_choice(self, field_name: str, choices: Sequence[str]) -> None:
        if getattr(self, field_name) not in choices:
            self._refuse(field_name, "one of " + ", ".join(choices))

    def _check_bool(self, field_name: str) -> None:
        if not isinstance(getattr(self, field_name), bool):
            self._refuse(field_name, "true or false")

    def _refuse(self, field_name: str, expected: str) -> None:
        value = getattr(self, field_name)
        raise ValueError(f"{self.name}: {field_name} must be {expected}, got {value!r}")

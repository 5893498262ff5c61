"""One method's tokens with another's budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vllm_kvcompress.methods.base import LayerInput, LayerScores, Method, Need, Schedule
from vllm_kvcompress.methods.window import observe


@dataclass(frozen=True, kw_only=True)
class Composed(Method):
    """Tokens from the scorer of one method, budgets and schedule from the allocator of another.

    ``scorer``, ``allocator``: methods, whole; only the parts of those names are used. ``window``:
    of both, and of the composition. ``name`` reads "scorer+allocator". What both parts read (the
    window's statistics, the keys) is computed once per layer. An allocator that looks at token
    scores (DynamicKV) looks at the scorer's.

    Everything that a cascade of cuts rests on is inherited: whether a smaller budget keeps the
    best of a larger one depends on the scorer alone, when layers are cut and what ratio their
    weights keep on the allocator alone.

    Raises ValueError if a part is not ``composable`` or has a window of its own.
    """

    scorer: Method
    allocator: Method

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in (self.scorer, self.allocator):
            check_composable(part)
            if part.window != self.window:
                raise ValueError(
                    f"{self.name}: all parts share the window of {self.window}, "
                    f"got {part.window} for {part.name}"
                )

    @property
    def name(self) -> str:  # type: ignore[override]  # of a class elsewhere, of an object here
        """Both parts' names."""
        return f"{self.scorer.name}+{self.allocator.name}"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What either part reads."""
        return self.scorer.needs | self.allocator.allocator_needs

    @property
    def composable(self) -> bool:
        return False

    # --- scorer ----------------------------------------------------------------------------------

    @property
    def uses_window_statistics(self) -> bool:
        return self.scorer.uses_window_statistics or self._allocator_observes

    @property
    def _allocator_observes(self) -> bool:
        window = Need.WINDOW_QUERIES in self.allocator.allocator_needs
        return window and self.allocator.uses_window_statistics

    def score(self, layer: LayerInput) -> LayerScores:
        shared = self._shared(layer)
        blind = replace(shared, observe=None)
        tokens = self.scorer.score(shared if self.scorer.uses_window_statistics else blind).tokens
        stats = self.allocator.layer_stats(shared if self._allocator_observes else blind)
        return LayerScores(tokens, stats)

    def _shared(self, layer: LayerInput) -> LayerInput:
        """The same layer, with keys that are read once and statistics that are taken once."""
        if layer.read_keys is not None:
            layer = replace(layer, read_keys=cache(layer.read_keys))
        return replace(layer, observe=cache(partial(observe, layer, self.window, self.name)))

    def select(self, scores: LayerScores, count: int) -> Tensor:
        return self.scorer.select(scores, count)

    def select_layers(self, scores: Sequence[LayerScores], counts: Sequence[int]) -> list[Tensor]:
        return self.scorer.select_layers(scores, counts)

    @property
    def budgets_are_nested(self) -> bool:
        return self.scorer.budgets_are_nested

    @property
    def stores_by_worth(self) -> bool:
        return self.scorer.stores_by_worth

    # --- allocator -------------------------------------------------------------------------------

    @property
    def budgets_ignore_scores(self) -> bool:  # type: ignore[override]
        """As the allocator's."""
        return self.allocator.budgets_ignore_scores

    @property
    def ratios_are_fixed(self) -> bool:
        return self.allocator.ratios_are_fixed

    @property
    def schedule(self) -> Schedule:
        return self.allocator.schedule

    def layer_stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        return self.allocator.layer_stats(layer)

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        return self.allocator.weights(seen, base=base, num_layers=num_layers)

    def cap(self, history: int, base: int) -> int:
        return self.allocator.cap(history, base)

    def floor(self, history: int, base: int) -> int:
        return self.allocator.floor(history, base)


def check_composable(method: Method) -> None:
    """ValueError if no part of the method can be used on its own."""
    if not method.composable:
        raise ValueError(
            f"{method.name}: it cannot be combined with the scorer or allocator of another method, "
            "as it keeps everything, evicts token by token or is faithful to released code"
        )

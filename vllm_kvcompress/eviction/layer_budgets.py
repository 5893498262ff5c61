"""How many tokens, or whole pages, every layer keeps.

A method only says how much each layer *deserves* (its weights). Turning that into integers that
spend the pool exactly, respect what a layer can hold and never let a layer grow again is the same
for all methods and stands here and in :mod:`.apportionment`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.eviction.apportionment import Floats, Ints, apportion
from vllm_kvcompress.methods import LayerScores, Method, StagedDivision
from vllm_kvcompress.paging.rounding import cdiv


class BudgetDivision:
    """The division of one request's pool while its layers are seen one after another.

    The pool is divided again and again, each time between the layers seen so far; until then a new
    layer may hold all that its cap allows. A budget never rises from one division to the next, so
    the caller can drop tokens for good at each. After the last layer the budgets sum to the pool
    (and ``reserved`` of each layer), or to all caps if those are less, provided that can be reached
    without a layer growing, which is so whenever cap * num_layers >= pool.

    Args:
        method: Weighs the layers, and says after which of them to divide.
        pool: Units, tokens or pages, that the layers share.
        cap: Most units of one layer, or of each, int [num_layers].
        floor: Units that every layer gets first, or each, int [num_layers].
        base: History tokens of an average layer, for the method.
        num_layers: L.
        reserved: Units that every layer has beside its part of the pool.

    Attributes:
        weights: The method's weights of the layers at the last division, fp64 [layers seen]; None
            before the first.

    """

    def __init__(
        self,
        method: Method,
        *,
        pool: int,
        cap: int | Sequence[int],
        floor: int | Sequence[int],
        base: int,
        num_layers: int,
        reserved: int = 0,
    ) -> None:
        self.weights: Floats | None = None
        self._method = method
        self._pool = pool
        self._caps: Ints = np.broadcast_to(np.asarray(cap, dtype=np.int64), (num_layers,))
        self._floors: Ints = np.broadcast_to(np.asarray(floor, dtype=np.int64), (num_layers,))
        self._base = base
        self._num_layers = num_layers
        self._reserved = reserved
        self._every = method.allocator.layers_per_division
        self._seen: list[LayerScores] = []
        self._shared: Ints = np.zeros(0, dtype=np.int64)

    @property
    def held(self) -> Ints:
        """Units that each layer seen so far may hold now, int64 [layers seen], a copy."""
        return self._shared + self._reserved

    def add(self, scores: LayerScores) -> Ints | None:
        """Take the next layer's scores. Mutates the division.

        Returns:
            New budgets of all layers seen, int64; None where the pool is not divided after this
            layer.

        Raises:
            ValueError: All layers have been seen, or the method returns unusable weights.

        """
        self._see([scores])
        count = len(self._seen)
        if count < self._num_layers and (not self._every or count % self._every):
            return None
        weights = self._method.weights(self._seen, base=self._base, num_layers=self._num_layers)
        self._divide(weights)
        return self.held

    def divide_all(self, layers: Sequence[LayerScores]) -> Ints:
        """Take the scores of several layers at once. Mutates the division.

        Returns:
            Budgets of all layers seen, int64: those after the last of them.

        Raises:
            ValueError: As :meth:`add`.

        """
        staged = self.staged(layers)
        (weights,) = self._method.allocator.weights_by_stage([staged], num_layers=self._num_layers)
        return self.divide_by(staged, weights)

    def staged(self, layers: Sequence[LayerScores]) -> StagedDivision:
        """Say after how many of some layers the pool is divided, the last of them included.

        Args:
            layers: Scores of layers, as for :meth:`divide_all`; none has been seen yet.

        """
        last = len(layers)
        every = 0 if self._method.allocator.ratios_are_fixed else self._every
        between = range(every, last, every) if every else ()
        return StagedDivision(layers, (*between, last), self._base)

    def divide_by(self, staged: StagedDivision, weights: Sequence[npt.NDArray[np.float64]]) -> Ints:
        """Divide as :meth:`divide_all`, with weights that are known. Mutates the division.

        Args:
            staged: From :meth:`staged`.
            weights: The allocator's, at each of its stages.

        Raises:
            ValueError: The method has returned unusable weights.

        """
        for seen, own in zip(staged.stages, weights, strict=True):
            self._see(staged.layers[len(self._seen) : seen])
            self._divide(own)
        return self.held

    def _see(self, layers: Sequence[LayerScores]) -> None:
        first = len(self._seen)
        if first + len(layers) > self._num_layers:
            raise ValueError(f"all {self._num_layers} layers have been seen already")
        self._seen.extend(layers)
        self._shared = np.append(self._shared, self._caps[first : len(self._seen)])

    def _divide(self, weights: npt.NDArray[np.float64]) -> None:
        """Divide the whole pool between the layers seen so far, within what each still holds."""
        count = len(self._seen)
        if np.shape(weights) != (count,):
            raise ValueError(
                f"{self._method.name}: weights must have shape ({count},), got {np.shape(weights)}"
            )
        self.weights = np.asarray(weights, dtype=np.float64)
        self._shared = apportion(weights, self._shared, self._pool, floors=self._floors[:count])


def page_division(
    method: Method,
    *,
    num_layers: int,
    pages_per_layer: int,
    block_size: int,
    lengths: int | Sequence[int],
    pinned: int | Sequence[int] = 0,
) -> BudgetDivision:
    """Prepare the division of an arena's whole pages.

    Every layer gets the pages that the protected window fills; the rest is divided. A layer gets at
    most its length // block_size pages (only full pages of survivors).

    Args:
        method: Weighs the layers. If its own cap cannot hold the pool, it is raised just enough.
        num_layers: L.
        pages_per_layer: R, so the arena has R * L pages and a layer's average capacity is
            C = R * block_size tokens.
        block_size: Tokens per page.
        lengths: Tokens that each layer holds now; one number if all hold as many.
        pinned: History tokens that every layer must have room for, or each of them; on average at
            most C - window.

    Raises:
        ValueError: The lengths leave nothing to evict, or the window does not fit R pages.

    """
    held = np.broadcast_to(np.asarray(lengths, dtype=np.int64), (num_layers,))
    capacity = pages_per_layer * block_size
    reserved = cdiv(method.window, block_size)
    full = held // block_size - reserved
    pool = (pages_per_layer - reserved) * num_layers
    if held.sum() <= capacity * num_layers or full.sum() < pool:
        tokens = int(held.max())
        raise ValueError(
            f"a prompt of {tokens} tokens fits the budget of {capacity}: nothing to evict"
        )
    if reserved > pages_per_layer:
        raise ValueError(
            f"{method.name}: a window of {method.window} tokens needs {reserved} pages of "
            f"{block_size} tokens, the budget is {pages_per_layer} per layer"
        )
    base = capacity - method.window
    history = (held - method.window).tolist()
    own = [
        max(cdiv(method.allocator.cap(tokens, base), block_size), pages_per_layer - reserved)
        for tokens in history
    ]
    caps = np.minimum(full, own)
    if caps.sum() < pool:  # layers that hold little cannot make up for those that may not
        caps = full
    least = method.allocator.floor(min(history), base)
    needed = np.broadcast_to(np.asarray(pinned, dtype=np.int64), (num_layers,))
    floors = _floors(method.window, least, needed, block_size)
    if needed.any():
        # Where the pool is too small for all floors none of them would hold, so let them fit.
        least = min(least, base)
        while (floors := _floors(method.window, least, needed, block_size)).sum() > pool and least:
            least = max(least - block_size, 0)
        caps = np.maximum(caps, np.minimum(floors, full))
    return BudgetDivision(
        method,
        pool=pool,
        cap=caps.tolist(),
        floor=floors.tolist(),
        base=base,
        num_layers=num_layers,
        reserved=reserved,
    )


def _floors(window: int, least: int, needed: Ints, block_size: int) -> Ints:
    """Pages of each layer, beside those of the window, for so many tokens of the history."""
    tokens = window + np.maximum(needed, least)
    floors: Ints = -(-tokens // block_size) - cdiv(window, block_size)
    return floors

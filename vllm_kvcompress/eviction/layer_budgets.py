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
from vllm_kvcompress.methods.faults import check_limit, check_weights, method_code
from vllm_kvcompress.paging.rounding import cdiv

WEIGHING = "weighing the layers"
"""What a method does, for the sentence about its faults."""


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
            ValueError: All layers have been seen.
            MethodError: The method has failed; nothing has changed.

        """
        seen, weights = [*self._seen, scores], None
        count = self._check_count(1)
        if count >= self._num_layers or (self._every and not count % self._every):
            with method_code(self._method.name, WEIGHING):
                found = self._method.weights(seen, base=self._base, num_layers=self._num_layers)
            weights = check_weights(self._method.name, found, count)
        self._see([scores])
        if weights is None:
            return None
        self._divide(weights)
        return self.held

    def divide_all(self, layers: Sequence[LayerScores]) -> Ints:
        """Take the scores of several layers at once. Mutates the division.

        Returns:
            Budgets of all layers seen, int64: those after the last of them.

        Raises:
            ValueError: As :meth:`add`.
            MethodError: As :meth:`add`.

        """
        staged = self.staged(layers)
        with method_code(self._method.name, WEIGHING):
            (weights,) = self._method.allocator.weights_by_stage(
                [staged], num_layers=self._num_layers
            )
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
            MethodError: The method has returned unusable weights; nothing has changed.

        """
        name = self._method.name
        with method_code(name, WEIGHING):
            pairs = list(zip(staged.stages, weights, strict=True))
        checked = [(seen, check_weights(name, own, seen)) for seen, own in pairs]
        for seen, own in checked:
            self._see(staged.layers[len(self._seen) : seen])
            self._divide(own)
        return self.held

    def share_equally(self, fallback: Method) -> None:
        """Go on with another method, after the same layers as before. Mutates the division.

        What layers hold already never rises. If the pool can be spent exactly with the former
        method, it can with this one, as that depends on what layers hold and not on their weights.

        Args:
            fallback: Weighs all layers alike.

        """
        self._method = fallback

    def _see(self, layers: Sequence[LayerScores]) -> None:
        first = len(self._seen)
        self._check_count(len(layers))
        self._seen.extend(layers)
        self._shared = np.append(self._shared, self._caps[first : len(self._seen)])

    def _check_count(self, more: int) -> int:
        """Return how many layers will have been seen after some more; ValueError if too many."""
        count = len(self._seen) + more
        if count > self._num_layers:
            raise ValueError(f"all {self._num_layers} layers have been seen already")
        return count

    def _divide(self, weights: Floats) -> None:
        """Divide the whole pool between the layers seen so far, within what each still holds."""
        self.weights = weights
        floors = self._floors[: len(self._seen)]
        self._shared = apportion(weights, self._shared, self._pool, floors=floors)


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
        MethodError: The method's cap or floor cannot be used.

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
    with method_code(method.name, "its cap"):
        limits = [method.allocator.cap(tokens, base) for tokens in history]
    own = [
        max(cdiv(check_limit(method.name, "cap", limit), block_size), pages_per_layer - reserved)
        for limit in limits
    ]
    caps = np.minimum(full, own)
    if caps.sum() < pool:  # layers that hold little cannot make up for those that may not
        caps = full
    with method_code(method.name, "its floor"):
        least = method.allocator.floor(min(history), base)
    least = check_limit(method.name, "floor", least)
    needed = np.broadcast_to(np.asarray(pinned, dtype=np.int64), (num_layers,))
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

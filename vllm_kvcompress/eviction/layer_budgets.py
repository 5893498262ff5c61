"""How many tokens, or whole pages, every layer keeps.

A method only says how much each layer *deserves* (its weights). Turning that into integers that
spend the pool exactly, respect what a layer can hold and never let a layer grow again is the same
for all methods and lives here.

Seats of the pool are given one at a time to the layer with the highest p / (b + 1/2), Webster's
rule. Unlike flooring and handing out remainders, it ranks all seats of all layers in one fixed
order, so that a further layer can only push seats of earlier layers out. Dividing after every
layer (CAKE's cascade) and dividing once at the end thus give the same integers, not just nearly
the same: the paper's theorem survives rounding.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.methods.base import LayerScores, Method

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Width of the last bracket of log2(divisor): far above rounding (1e-16), far below one seat in 1e6.
_BRACKET = 1e-8


def apportion(
    weights: npt.ArrayLike,
    caps: npt.ArrayLike,
    pool: int,
    *,
    floors: npt.ArrayLike | None = None,
) -> Ints:
    """Divide ``pool`` seats in proportion to ``weights``: capped Webster apportionment.

    ``weights``: [L] finite, >= 0, any scale (only ratios count; 1e-300 beside 1e300 is fine).
    ``caps``: [L] integers >= 0, most seats of each layer. ``floors``: [L] integers >= 0, seats that
    come first; a floor above the cap counts as the cap, and if the pool is too small for all floors
    it is divided within them. Returns int64 [L], nothing is mutated.

    The result sums to min(pool, sum(caps)). Ties go to the lower index. A layer of weight zero gets
    seats beyond its floor only when every layer of positive weight is at its cap, and then evenly;
    all weights zero means an even split. With pool, caps and floors unchanged, a further layer
    never raises anybody's share; multiplying all weights by a power of two changes nothing.

    Raises ValueError for weights that are negative or not finite, negative caps, floors or pool,
    and lengths that differ.

    Source: replaces the integer fix-up of the released code (cakekv utils.py, DynamicKV
    dynamic_v11.py), which overshoots caps, loses budget and is not monotone.
    """
    share = np.asarray(weights, dtype=np.float64)
    cap = np.asarray(caps, dtype=np.int64)
    floor = np.zeros_like(cap) if floors is None else np.asarray(floors, dtype=np.int64)
    _check(share, cap, floor, pool)
    floor = np.minimum(floor, cap)
    pool = min(int(pool), int(cap.sum()))
    if floor.sum() > pool:
        cap, floor = floor, np.zeros_like(floor)
    result = floor.copy()
    positive = share > 0.0
    for members in (positive, ~positive):
        left = pool - int(result[~members].sum())
        seats = min(left, int(cap[members].sum()))
        even = np.ones(int(members.sum()))
        chosen = share[members] if members is positive else even
        result[members] = _webster(chosen, cap[members], floor[members], seats)
    return result


def _check(share: Floats, cap: Ints, floor: Ints, pool: int) -> None:
    if share.ndim != 1 or share.shape != cap.shape or share.shape != floor.shape:
        raise ValueError(
            "weights, caps and floors must be vectors of one length, "
            f"got {share.shape}, {cap.shape} and {floor.shape}"
        )
    bad = np.flatnonzero(~(np.isfinite(share) & (share >= 0.0)))
    if bad.size:
        layer = int(bad[0])
        raise ValueError(f"weights must be finite and not negative, got {share[layer]} at {layer}")
    if (cap < 0).any() or (floor < 0).any() or pool < 0:
        raise ValueError("caps, floors and the pool must not be negative")


def _webster(weights: Floats, caps: Ints, floors: Ints, seats: int) -> Ints:
    """Divide ``seats`` (sum(floors) <= seats <= sum(caps)) over layers of positive weight."""
    if seats >= caps.sum():
        return caps.copy()
    mantissa, exponent = np.frexp(weights)
    shift = (exponent - exponent.max()).astype(np.float64)

    def filled(log2_scale: float) -> Ints:
        # A quota above every cap or below half a seat needs no exact value: keep exp2 in range.
        quota = mantissa * np.exp2(np.clip(shift + log2_scale, -64.0, 62.0))
        held = np.minimum(np.floor(quota + 0.5), caps).astype(np.int64)
        return np.maximum(held, floors)

    low, high = -2.0, 64.0 - float(shift.min())  # everybody at the floor; everybody at the cap
    while high - low > _BRACKET:
        middle = 0.5 * (low + high)
        if filled(middle).sum() <= seats:
            low = middle
        else:
            high = middle
    # One bracket lower, so that rounding cannot have put a seat here that does not belong.
    result = filled(low - _BRACKET)
    _hand_out(result, mantissa, exponent, caps, seats - int(result.sum()))
    return result


def _hand_out(result: Ints, mantissa: Floats, exponent: Ints, caps: Ints, left: int) -> None:
    """Give the last ``left`` seats singly, in exact order of priority; changes ``result``."""

    def request(layer: int) -> tuple[int, float, int]:
        # (binary exponent, mantissa) orders the quotients without overflow, and in the same way
        # whatever power of two the weights were scaled by.
        fraction, power = math.frexp(float(mantissa[layer]) / (float(result[layer]) + 0.5))
        return -(power + int(exponent[layer])), -fraction, layer

    queue = [request(layer) for layer in range(len(result)) if result[layer] < caps[layer]]
    heapq.heapify(queue)
    for _ in range(left):
        layer = queue[0][2]
        result[layer] += 1
        if result[layer] < caps[layer]:
            heapq.heapreplace(queue, request(layer))
        else:
            heapq.heappop(queue)


class BudgetDivision:
    """The division of one request's pool while its layers are seen one after another.

    ``add`` takes the scores of the next layer; at the method's cuts (its ``schedule``, and always
    the last layer) it divides the whole pool between the layers seen so far and returns what each
    may keep, int64 [layers seen]; between cuts it returns None and the new layer keeps everything
    it may (``cap``). A budget never rises from one cut to the next, so the caller can drop tokens
    for good at each. After the last layer the budgets sum to min(pool, cap * num_layers), provided
    ``cap * num_layers`` can be reached without a layer growing, which is so whenever
    cap * num_layers >= pool.

    ``pool``, ``cap`` (most units of one layer, or of each) and ``floor`` are in the unit that is
    divided, tokens or pages; ``base`` is passed on to the method, in tokens.
    """

    def __init__(
        self,
        method: Method,
        *,
        pool: int,
        cap: int | Sequence[int],
        floor: int,
        base: int,
        num_layers: int,
    ) -> None:
        self._method = method
        self._pool = pool
        self._caps: Ints = np.broadcast_to(np.asarray(cap, dtype=np.int64), (num_layers,))
        self._floor = floor
        self._base = base
        self._num_layers = num_layers
        self._seen: list[LayerScores] = []
        self._held: Ints = np.zeros(0, dtype=np.int64)

    @property
    def held(self) -> Ints:
        """Units each layer seen so far may hold now (a copy)."""
        return self._held.copy()

    @property
    def ratios_are_fixed(self) -> bool:
        """Whether cuts between layers make no difference to where the last one ends."""
        return self._method.ratios_are_fixed

    def see(self, layers: Sequence[LayerScores]) -> None:
        """Take several layers' scores without a cut. Mutates the cascade."""
        first = len(self._seen)
        self._seen.extend(layers)
        self._held = np.append(self._held, self._caps[first : len(self._seen)])

    def add(self, scores: LayerScores) -> Ints | None:
        """Take the next layer's scores; the new budgets of all layers seen if there is a cut.

        Raises ValueError if all layers have been seen, or the method returns unusable weights.
        """
        count = len(self._seen) + 1
        if count > self._num_layers:
            raise ValueError(f"all {self._num_layers} layers have been seen already")
        self.see([scores])
        if not self._method.schedule.cuts_after(count, self._num_layers):
            return None
        self.cut()
        return self.held

    def cut(self) -> None:
        """Divide the whole pool between the layers seen so far, within what each still holds."""
        count = len(self._seen)
        weights = self._method.weights(self._seen, base=self._base, num_layers=self._num_layers)
        if np.shape(weights) != (count,):
            raise ValueError(
                f"{self._method.name}: weights must have shape ({count},), got {np.shape(weights)}"
            )
        floors = np.full(count, self._floor, dtype=np.int64)
        self._held = apportion(weights, self._held, self._pool, floors=floors)


def token_budgets(
    method: Method, layers: Sequence[LayerScores], *, base: int, num_layers: int
) -> Ints:
    """History tokens every layer keeps (the protected window comes on top).

    ``layers``: scores of the layers seen so far, normally all ``num_layers``. ``base``: history
    tokens of an average layer, so the pool is base * num_layers. Returns int64 [len(layers)] that
    sums to min(pool, S' * len(layers)), or less if the method's own cap binds while layers are
    still missing. A method whose own cap cannot hold the pool has it raised to ``base``.

    Raises ValueError if base is negative, no layer is given or more than ``num_layers``.
    """
    if base < 0:
        raise ValueError(f"base must not be negative, got {base}")
    if not 1 <= len(layers) <= num_layers:
        raise ValueError(f"expected 1 to {num_layers} layers, got {len(layers)}")
    history = layers[0].tokens.shape[-1]
    own = max(method.cap(history, base), base)
    cascade = BudgetDivision(
        method,
        pool=base * num_layers,
        cap=min(history, own),
        floor=method.floor(history, base),
        base=base,
        num_layers=num_layers,
    )
    return _run(cascade, layers)


def page_cascade(
    method: Method,
    *,
    num_layers: int,
    pages_per_layer: int,
    block_size: int,
    lengths: int | Sequence[int],
    pinned: int = 0,
) -> tuple[BudgetDivision, int]:
    """The division of an arena's whole pages, window pages apart.

    ``num_layers``: L. ``pages_per_layer``: R, so the arena has R * L pages and a layer's average
    capacity is C = R * block_size tokens. ``lengths``: tokens that each layer holds now; one
    number if all hold as many. ``keep``: history tokens that every layer must have room for, at
    most C - window. Returns a cascade over the pages beyond those that the protected window fills,
    and how many pages of every layer those are. A layer gets at most its length // block_size
    (only full pages of survivors). A method whose own cap cannot hold the pool has it
    raised just enough.

    Raises ValueError if the lengths leave nothing to evict, or the window does not fit R pages.
    """
    held = np.broadcast_to(np.asarray(lengths, dtype=np.int64), (num_layers,))
    capacity = pages_per_layer * block_size
    reserved = -(-method.window // block_size)
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
        max(-(-method.cap(tokens, base) // block_size), pages_per_layer - reserved)
        for tokens in history
    ]
    caps = np.minimum(full, own)
    if caps.sum() < pool:  # layers that hold little cannot make up for those that may not
        caps = full
    least = method.floor(min(history), base)
    if pinned:
        # Where the pool is too small for all floors none of them would hold, so let them fit.
        least = max(min(least, base), pinned)
    wanted = -(-(method.window + least) // block_size)
    cascade = BudgetDivision(
        method,
        pool=pool,
        cap=caps.tolist(),
        floor=wanted - reserved,
        base=base,
        num_layers=num_layers,
    )
    return cascade, reserved


def page_budgets(
    method: Method,
    layers: Sequence[LayerScores],
    *,
    pages_per_layer: int,
    block_size: int,
    lengths: int | Sequence[int],
    pinned: int = 0,
) -> Ints:
    """Whole pages every layer keeps, the protected window included.

    ``layers``: scores of all L layers; the rest as for :func:`page_cascade`. Returns int64 [L]
    that sums to R * L exactly; every layer gets at least the pages its window fills.

    Raises ValueError as :func:`page_cascade` does, or if no layer is given.
    """
    if not layers:
        raise ValueError("expected at least one layer")
    cascade, reserved = page_cascade(
        method,
        num_layers=len(layers),
        pages_per_layer=pages_per_layer,
        block_size=block_size,
        lengths=lengths,
        pinned=pinned,
    )
    return _run(cascade, layers) + reserved


def _run(cascade: BudgetDivision, layers: Sequence[LayerScores]) -> Ints:
    if cascade.ratios_are_fixed:
        cascade.see(layers)
        cascade.cut()
        return cascade.held
    budgets = None
    for scores in layers:
        budgets = cascade.add(scores)
    if budgets is None:  # the layers given end between two cuts of an unfinished model
        cascade.cut()
    return cascade.held

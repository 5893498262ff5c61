"""Dividing a pool of seats in proportion to weights, in integers.

Seats are given one at a time to the layer with the highest p / (b + 1/2), where p is its weight and
b the seats it has: Webster's rule. It ranks all seats of all layers in one fixed order, so that a
further layer can only push seats of earlier layers out. Flooring and handing out remainders does
not. Dividing after every layer (CAKE's cascade) and dividing once at the end thus give the same
integers: the paper's theorem survives rounding.
"""

import heapq
import math

import numpy as np
import numpy.typing as npt

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

    The result sums to min(pool, sum(caps)). Ties go to the lower index. A layer of weight zero gets
    seats beyond its floor only when every layer of positive weight is at its cap, and then evenly;
    all weights zero means an even split. With pool, caps and floors unchanged, a further layer
    never raises another layer's seats; multiplying all weights by a power of two changes nothing.

    Replaces the integer fix-up of the released code (cakekv utils.py, DynamicKV dynamic_v11.py),
    which exceeds caps, loses budget and is not monotone.

    Args:
        weights: [L], finite, at least 0, on any scale: only ratios count.
        caps: Most seats of each layer, int [L], at least 0.
        pool: Seats, at least 0.
        floors: Seats that each layer gets first, int [L]; at most its cap counts. If the pool is
            too small for all floors, it is divided within them.

    Returns:
        Seats of each layer, int64 [L], new.

    Raises:
        ValueError: Weights are negative or not finite, caps, floors or pool are negative, or
            lengths differ.

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
    missing = seats
    # The last few seats take less time singly, and go to the same layers.
    while high - low > _BRACKET and missing > len(weights):
        middle = 0.5 * (low + high)
        given = int(filled(middle).sum())
        if given <= seats:
            low, missing = middle, seats - given
        else:
            high = middle
    # One bracket lower, so that rounding cannot have put a seat here that does not belong.
    result = filled(low - _BRACKET)
    _hand_out(result, mantissa, exponent, caps, seats - int(result.sum()))
    return result


def _hand_out(result: Ints, mantissa: Floats, exponent: Ints, caps: Ints, left: int) -> None:
    """Give the last ``left`` seats singly, in exact order of priority; changes ``result``."""

    def seat(layer: int) -> tuple[int, float, int]:
        # (binary exponent, mantissa) orders the quotients without overflow, and in the same way
        # whatever power of two the weights were scaled by.
        fraction, power = math.frexp(float(mantissa[layer]) / (float(result[layer]) + 0.5))
        return -(power + int(exponent[layer])), -fraction, layer

    queue = [seat(layer) for layer in range(len(result)) if result[layer] < caps[layer]]
    heapq.heapify(queue)
    for _ in range(left):
        layer = queue[0][2]
        result[layer] += 1
        if result[layer] < caps[layer]:
            heapq.heapreplace(queue, seat(layer))
        else:
            heapq.heappop(queue)

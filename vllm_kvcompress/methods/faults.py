"""What can go wrong in a method's own code, as one exception: :class:`MethodError`.

A method may come from another package, and a built-in one may be given a layer whose attention is
NaN. Either is the matter of one request, never of the engine, so all code of a method runs within
:func:`method_code`, and what it returns is checked where it comes back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, isnan
from numbers import Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_kvcompress.methods.layer import LayerScores


class MethodError(ValueError):
    """A method's code has raised, or has returned what cannot be used. Names the method."""


@contextmanager
def method_code(name: str, doing: str) -> Iterator[None]:
    """Run a method's code: what it raises becomes a :class:`MethodError`, with the cause.

    Too little memory is a fault like others: the allocation has failed before anything ran, and
    a request that has less to read may well fit. What is no fault of one method passes: an error of
    the device, after which every call would fail, and what is no ``Exception``.

    Args:
        name: The method's.
        doing: What it does, for the sentence.

    Raises:
        MethodError: The code has raised.

    """
    try:
        yield
    except (MethodError, torch.AcceleratorError):
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise MethodError(f"{name}: {doing} has raised {cause}") from error


def check_scores(
    name: str, layer: int, tokens: object, stats: object, shape: tuple[int, int]
) -> None:
    """Check what a method has returned of a layer; never waits for a device.

    Args:
        name: The method's.
        layer: The layer.
        tokens: The scorer's.
        stats: The allocator's.
        shape: (N, S'), which the scores must have.

    Raises:
        MethodError: The scores are no fp32 tensor of the shape, or lie in the host's memory and are
            not finite; or a stat is not a number.

    """
    if not isinstance(tokens, Tensor):
        kind = type(tokens).__name__
        raise MethodError(f"{name}: the scorer has returned {kind} for layer {layer}, not a tensor")
    if tokens.shape != shape or tokens.dtype != torch.float32 or tokens.is_sparse:
        raise MethodError(
            f"{name}: score must return torch.float32 {list(shape)} for layer {layer} (KV heads, "
            f"tokens before the window), got {tokens.dtype} {list(tokens.shape)}"
        )
    # A finite sum is one of finite numbers, and takes a tenth of the time of a look at each.
    if tokens.device.type == "cpu" and not isfinite(tokens.sum()):
        bad = tokens.numel() - int(tokens.isfinite().sum())
        if bad:
            raise MethodError(
                f"{name}: {bad} of {tokens.numel()} scores of layer {layer} are not finite"
            )
    if not isinstance(stats, Mapping):
        kind = type(stats).__name__
        raise MethodError(f"{name}: stats of layer {layer} must be a mapping, got {kind}")
    for stat, value in stats.items():
        if not isinstance(value, Tensor | Real) or (
            isinstance(value, Tensor) and value.is_complex()
        ):
            raise MethodError(
                f'{name}: the stat "{stat}" of layer {layer} must be a number or a tensor, got '
                f"{type(value).__name__}"
            )


def check_device(name: str, layer: int, scores: LayerScores, device: torch.device) -> None:
    """Check where scores and stats lie: in the host's memory or on the model's device.

    Raises:
        MethodError: They lie elsewhere.

    """
    for value in (scores.tokens, *scores.stats.values()):
        if isinstance(value, Tensor) and value.device.type not in ("cpu", device.type):
            raise MethodError(
                f"{name}: the method has returned scores on {value.device} for layer {layer}, "
                f"where the model is on {device}"
            )


def check_stats(name: str, layers: Sequence[LayerScores], first: int = 0) -> None:
    """Check what an allocator has read, once it is numbers.

    On a device this is where attention that is NaN shows: the numbers come to the host anyway.

    Args:
        name: The method's.
        layers: Some layers' scores, their stats as numbers.
        first: Number of the first of them.

    Raises:
        MethodError: One of them is NaN; infinite ones are the method's own matter.

    """
    for layer, scores in enumerate(layers, first):
        for stat, value in scores.stats.items():
            if not isinstance(value, Tensor) and isnan(value):
                raise MethodError(f'{name}: the stat "{stat}" of layer {layer} is NaN')


def check_weights(name: str, weights: object, layers: int) -> npt.NDArray[np.float64]:
    """Return an allocator's weights as fp64 [layers].

    Args:
        name: The method's.
        weights: As they came.
        layers: Layers seen.

    Raises:
        MethodError: They are not one finite number of at least 0 for each layer.

    """
    with method_code(name, "weighing the layers"):
        found = np.asarray(weights, dtype=np.float64)
    if found.shape != (layers,):
        raise MethodError(f"{name}: weights must have shape ({layers},), got {found.shape}")
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0.0)))
    if bad.size:
        layer = int(bad[0])
        raise MethodError(
            f"{name}: weights must be finite and not negative, got {found[layer]} at {layer}"
        )
    return found


def check_limit(name: str, limit: str, tokens: object) -> int:
    """Return an allocator's cap or floor; MethodError unless it is an integer of at least 0."""
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 0:
        raise MethodError(f"{name}: its {limit} must be an integer of at least 0, got {tokens!r}")
    return int(tokens)


def check_choice(
    name: str, worth: Sequence[Tensor], chosen: Sequence[object], counts: Sequence[int]
) -> None:
    """Check the tokens that a scorer's own ``select`` has chosen; waits for a device once.

    Only such a scorer is asked to wait: a token that does not exist would be read from memory of
    others, and one chosen twice would be stored twice.

    Args:
        name: The method's.
        worth: Per layer the scores, [N, S'].
        chosen: Per layer the tokens, as they came.
        counts: Per layer how many there must be.

    Raises:
        MethodError: They are not what ``select`` is to return.

    """
    right = []
    for ids, scores, count in zip(chosen, worth, counts, strict=True):
        heads, history = scores.shape
        if not isinstance(ids, Tensor):
            raise MethodError(f"{name}: select has returned {type(ids).__name__}, not a tensor")
        integers = ids.dtype in (torch.int64, torch.int32)
        if not integers or ids.shape != (heads, count) or ids.device != scores.device:
            raise MethodError(
                f"{name}: select must return integers {[heads, count]} (KV heads, tokens to keep) "
                f"on {scores.device}, got {ids.dtype} {list(ids.shape)} on {ids.device}"
            )
        if count:
            ascending = (ids.diff(dim=1) > 0).all()
            right.append(ascending & (ids[:, 0] >= 0).all() & (ids[:, -1] < history).all())
    if right and not bool(torch.stack(right).all()):
        raise MethodError(
            f"{name}: select must return ascending tokens below {worth[0].shape[1]}, each once"
        )

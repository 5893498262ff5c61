"""What methods read of a layer: its keys, and the attention of the observation window."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvcompress_kernels.scoring import WindowStatistics, window_statistics
from kvcompress_kernels.selection import token_scores
from vllm_kvcompress.methods.layer import LayerInput, Need

KEY_NEEDS = frozenset({Need.KEYS})
WINDOW_NEEDS = frozenset({Need.WINDOW_QUERIES, Need.KEYS})

P = ParamSpec("P")
T = TypeVar("T")


def once_per_layer(
    read: Callable[Concatenate[LayerInput, P], T],
) -> Callable[Concatenate[LayerInput, P], T]:
    """Decorator: a scorer and an allocator that both call the function share one computation.

    Args:
        read: Computes something from a layer and hashable arguments. Nobody may change what it
            returns.

    """

    @wraps(read)
    def shared(layer: LayerInput, /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (read, args, *sorted(kwargs.items()))
        if key not in layer.reads:
            layer.reads[key] = read(layer, *args, **kwargs)
        found: T = layer.reads[key]
        return found

    return shared


@once_per_layer
def all_keys(layer: LayerInput) -> Tensor:
    """Return the keys [N, S, D], as given or read out of the cache.

    Raises:
        ValueError: The layer comes without keys.

    """
    if layer.keys is not None:
        return layer.keys
    if layer.read_keys is None:
        raise ValueError("scoring needs all keys")
    return layer.read_keys()


def queries_and_keys(layer: LayerInput) -> tuple[Tensor, Tensor]:
    """Return the window's queries [H, m, D] and all keys [N, S, D].

    Raises:
        ValueError: One of them is missing.

    """
    if layer.queries is None or (layer.keys is None and layer.read_keys is None):
        raise ValueError("scoring needs the window's queries and all keys")
    return layer.queries, all_keys(layer)


def attention_statistics(layer: LayerInput, queries: Tensor, keys: Tensor) -> WindowStatistics:
    """Return fp32 statistics of the attention of the last queries [H, m, D] on the history."""
    return window_statistics(
        queries,
        keys,
        window=layer.window,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        sinks=layer.sinks,
    )


@once_per_layer
def observe(layer: LayerInput) -> WindowStatistics:
    """Return fp32 statistics of the attention of the window's queries on the history.

    Raises:
        ValueError: Queries or keys are missing, and there is no kernel to ask.

    """
    if layer.observe is not None:
        return layer.observe()
    return attention_statistics(layer, *queries_and_keys(layer))


def window_votes(
    layer: LayerInput,
    *,
    kernel: int,
    pooling: Literal["avg", "max"] = "avg",
    reduce: Literal["mean", "max"] = "mean",
    gamma: float = 0.0,
    times: int = 1,
) -> Tensor:
    """Return SnapKV's scores of the history, fp32 [N, S'].

    They are the mean attention of the window's queries, pooled along tokens, then reduced over the
    query heads of a KV group. Layers that were observed together are scored together.

    Args:
        layer: The layer.
        kernel: Width of the pooling, odd.
        pooling: How neighbouring tokens are pooled.
        reduce: How the query heads of a KV group vote.
        gamma: Weight of the variance between the queries, which CAKE adds to the mean.
        times: Factor on the scores.

    Raises:
        ValueError: As :func:`observe`.

    """

    def votes(mean: Tensor, var: Tensor, lengths: Tensor | None) -> Tensor:
        scores = token_scores(
            mean,
            var,
            gamma=gamma,
            kernel=kernel,
            mode=pooling,
            num_kv_heads=layer.num_kv_heads,
            reduce=reduce,
            lengths=lengths,
        )
        return scores if times == 1 else scores * times

    if layer.batch is None:
        statistics = observe(layer)
        return votes(statistics.mean, statistics.var, None)
    name = ("window_votes", kernel, pooling, reduce, gamma, times)
    together = layer.batch.read(name, layer.job, lambda s: votes(s.mean, s.var, s.lengths))
    return together[:, : layer.history]


def window_scalars(layer: LayerInput) -> tuple[float | Tensor, float | Tensor]:
    """Return natural logarithms of the entropy and the shift of a layer; -inf for zero.

    Raises:
        ValueError: As :func:`observe`.

    """
    if layer.batch is None:
        statistics = observe(layer)
        return log(statistics.entropy), log(statistics.shift)
    read, job = layer.batch.read, layer.job
    return (
        read("log_entropy", job, lambda s: s.entropy.log()),
        read("log_shift", job, lambda s: s.shift.log()),
    )


def log(value: float | Tensor) -> float | Tensor:
    """Return a natural logarithm, -inf of zero."""
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0.0 else -math.inf


def score_keys(layer: LayerInput, worth: Callable[[Tensor], Tensor]) -> Tensor:
    """Return scores of the history from the keys alone, fp32 [N, S'].

    Args:
        layer: The layer.
        worth: Takes all keys of one KV head, fp32 [S, D], and returns a score of each, fp32 [S].
            It is called for one head after another, so that only one is held in fp32.

    Raises:
        ValueError: As :func:`all_keys`.

    """
    return torch.stack([worth(head.float())[: layer.history] for head in all_keys(layer)])

"""Layers as an engine gives them to a method, from tensors at hand or drawn at random."""

from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.methods import LayerInput, LayerScores, Method, Need

HEADS, KV_HEADS, DIM = 6, 2, 16


def random_layer(
    method: Method,
    index: int = 0,
    *,
    seed: int = 0,
    tokens: int = 100,
    dtype: torch.dtype = torch.float32,
    **facts: Any,
) -> LayerInput:
    """Draw a layer with as many queries as the method's window; layers differ in their sharpness.

    Args:
        method: Its needs and window count.
        index: Of the layer, of 6.
        seed: Of the numbers.
        tokens: S.
        dtype: Of queries and keys.
        facts: Other fields.

    """
    generator = torch.Generator().manual_seed(1000 * seed + index)
    queries = (1.0 + index) * torch.randn(HEADS, method.window, DIM, generator=generator)
    return LayerInput(
        **{
            "layer": index,
            "num_layers": 6,
            "num_tokens": tokens,
            "window": method.window,
            "num_kv_heads": KV_HEADS,
            "base": 24,
            "queries": queries.to(dtype) if Need.WINDOW_QUERIES in method.needs else None,
            "keys": torch.randn(KV_HEADS, tokens, DIM, generator=generator).to(dtype),
            "scale": DIM**-0.5,
            **facts,
        }
    )


def score_random(method: Method, layers: int = 6, **drawn: Any) -> list[LayerScores]:
    """Score several random layers of one prompt."""
    return [method.score(random_layer(method, index, **drawn)) for index in range(layers)]


def score_layers(method: Method, queries: Tensor, keys: Tensor, base: int) -> list[LayerScores]:
    """Score the layers of one prompt from queries [L, H, m, D] and keys [L, N, S, D]."""
    return [
        method.score(
            LayerInput(
                layer=layer,
                num_layers=len(keys),
                num_tokens=keys.shape[2],
                window=method.window,
                num_kv_heads=keys.shape[1],
                base=base,
                queries=queries[layer, :, -method.window :],
                keys=keys[layer],
                scale=keys.shape[-1] ** -0.5,
            )
        )
        for layer in range(len(keys))
    ]

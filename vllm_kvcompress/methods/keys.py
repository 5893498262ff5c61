"""All keys of a layer, for the methods that look at keys alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_kvcompress.methods.base import LayerInput, Need

KEY_NEEDS = frozenset({Need.KEYS})


def keys_at_hand(layer: LayerInput) -> Tensor | None:
    """Keys [N, S, D] as given or read out of the cache; None if there is neither."""
    if layer.keys is None and layer.read_keys is not None:
        return layer.read_keys()
    return layer.keys


def score_keys(
    layer: LayerInput, window: int, method: str, worth: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scores of the history from the keys alone: fp32 [N, S'].

    ``worth`` takes all keys of one KV head, fp32 [S, D], and returns a score of each, fp32 [S].
    Heads are taken one after another, so that only one of them is held in fp32. Raises ValueError
    if the layer comes without keys.
    """
    keys = keys_at_hand(layer)
    if keys is None:
        raise ValueError(f"{method}: scoring needs all keys")
    return torch.stack([worth(head.float())[: layer.num_tokens - window] for head in keys])

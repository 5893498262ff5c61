"""Budgets of all layers at once, to compare with papers and with a division layer by layer."""

from collections.abc import Sequence
from typing import Any

from vllm_kvcompress.eviction.apportionment import Ints
from vllm_kvcompress.eviction.layer_budgets import BudgetDivision, page_division
from vllm_kvcompress.methods import LayerScores, Method


def token_budgets(
    method: Method, layers: Sequence[LayerScores], *, base: int, num_layers: int
) -> Ints:
    """History tokens of the layers seen: single tokens are divided, as the papers do."""
    history = layers[0].tokens.shape[-1]
    most = max(method.allocator.cap(history, base), base)
    division = BudgetDivision(
        method,
        pool=base * num_layers,
        cap=min(history, most),
        floor=method.allocator.floor(history, base),
        base=base,
        num_layers=num_layers,
    )
    return division.divide_all(layers)


def page_budgets(method: Method, layers: Sequence[LayerScores], **sizes: Any) -> Ints:
    """Whole pages of all layers, the window's included; sizes as of ``page_division``."""
    return page_division(method, num_layers=len(layers), **sizes).divide_all(layers)

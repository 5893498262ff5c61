"""Settings that are compared: a method, its parameters and a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_policy import OFF

FULL = "full"
"""Label of the full cache."""


@dataclass(frozen=True)
class Setting:
    """A method with its parameters and a budget.

    Attributes:
        label: Name of the method with its parameters, such as ``cake`` or ``cake, faithful``.
        method: Name of the method in the backend.
        params: Parameters of the method.
        budget: Tokens per layer, or a share of what is compressed; None: the full cache.

    """

    label: str
    method: str
    budget: int | float | None
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache."""
        return self.budget is None


def full() -> Setting:
    """The full cache, that everything is compared with."""
    return Setting(FULL, OFF, None)


def kept_tokens(budget: float | None, tokens: int, block_size: int, window: int = 32) -> int:
    """Tokens that a layer holds on average after the prefill; all of a prompt that is not cut.

    Every backend keeps as many, so that settings are compared at the same number of bytes.

    Args:
        budget: The same as in :class:`Setting`.
        tokens: Number of tokens that are compressed.
        block_size: Tokens of a block; budgets are whole blocks.
        window: Tokens of the observation window, which no method drops.

    """
    if budget is None:
        return tokens
    cut = _planner(budget, block_size, window).prompt_cut(tokens)
    return tokens if cut is None else cut.blocks * block_size


@lru_cache(maxsize=64)
def _planner(budget: int | float, block_size: int, window: int) -> BlockPlanner:
    return BlockPlanner(KVCompressionConfig("uniform", budget, {"window": window}), block_size)

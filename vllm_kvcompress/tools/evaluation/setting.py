"""What is compared: a method, its parameters and a budget."""

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
    """One column of the table.

    Attributes:
        label: How the method with its parameters is called, such as ``cake`` or ``cake, faithful``.
        method: Its name; for another backend than vLLM the name there.
        params: Its parameters.
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
    """Tokens that a layer holds on average after the prefill, a prompt's own where it is not cut.

    Whoever answers is given just as many, so that what is compared has the same bytes.

    Args:
        budget: As in :class:`Setting`.
        tokens: Of what is compressed.
        block_size: Tokens of a block; budgets are whole blocks.
        window: Tokens that no method drops.

    """
    if budget is None:
        return tokens
    cut = _planner(budget, block_size, window).prompt_cut(tokens)
    return tokens if cut is None else cut.blocks * block_size


@lru_cache(maxsize=64)
def _planner(budget: int | float, block_size: int, window: int) -> BlockPlanner:
    return BlockPlanner(KVCompressionConfig("uniform", budget, {"window": window}), block_size)

"""The same budget in every layer: what all methods share that only rank tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class EqualShares(Method):
    """Base of methods whose layers all get the same, known before any layer has run."""

    budgets_ignore_scores: ClassVar[bool] = True

    def cap(self, history: int, base: int) -> int:
        """No layer ever needs more than its equal share."""
        return min(history, base)

"""Reading files of outputs recorded from the released code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Golden:
    path: Path
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def need(self, *names: str) -> None:
        missing = [name for name in names if name not in self.arrays]
        if missing:
            pytest.skip(f"{self.path.name} has no {', '.join(missing)}")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta["dtype"])

    @property
    def exact(self) -> bool:
        return self.meta["dtype"] == "float32"

    @property
    def history(self) -> int:
        return self.meta["S"] - self.meta["window"]

    @property
    def base(self) -> int:
        capacity = "cache_size" if self.meta["method"] == "cake" else "max_capacity_prompt"
        return self.meta[capacity] - self.meta["window"]

    def real(self, name: str) -> Tensor:
        return (torch.from_numpy(self.arrays[name]).float() / 16).to(self.dtype)

    @property
    def prompt_keys(self) -> Tensor:
        return self.real("k")[:, :, :, : self.meta["S"]].contiguous()

    def values(self, heads: int) -> Tensor:
        """Values that spell the token id, [B, heads, S + T, D]."""
        ids = torch.arange(self.arrays["k"].shape[3])
        rows = torch.zeros(len(ids), self.meta["D"])
        rows[:, 0], rows[:, 1] = ids // 64, ids % 64
        return rows.expand(self.meta["B"], heads, -1, -1)

    def kept(self, prefix: str) -> list[Tensor]:
        names = [f"{prefix}_l{layer}" for layer in range(self.meta["L"])]
        self.need(*names)
        return [torch.from_numpy(self.arrays[name]).long() for name in names]


@lru_cache(maxsize=64)
def load(path: Path) -> Golden:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    meta = json.loads(bytes(arrays["meta"])) if "meta" in arrays else {}
    return Golden(path, meta, arrays)


def kind(path: Path) -> str:
    """What a file holds: adjust, cake, dynamickv, or unknown."""
    if path.suffix == ".json":
        cases = json.loads(path.read_text(encoding="utf-8"))
        fields = {"budget_list", "total_budget", "seq_len", "out"}
        good = isinstance(cases, list) and all(fields <= set(case) for case in cases)
        return "adjust" if good and cases else "unknown"
    method = load(path).meta.get("method")
    return method if method in ("cake", "dynamickv") else "unknown"

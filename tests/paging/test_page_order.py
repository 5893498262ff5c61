"""Fetching tokens from pages of any order: what is fetched does not depend on how."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_kvcompress.paging.page_order import PageOrder

SIZE, DIM, PAGES = 32, 64, 5


def places(*axes: tuple[str, int]) -> Tensor:
    """Places of [token, element] in a page whose memory runs through some axes, outermost first."""
    shape = [n for _, n in axes]
    grid = torch.arange(SIZE * DIM).view(shape)
    tokens = [i for i, (kind, _) in enumerate(axes) if kind == "token"]
    elements = [i for i, (kind, _) in enumerate(axes) if kind == "element"]
    return grid.permute(*tokens, *elements).reshape(SIZE, DIM)


ORDERS = {
    "token after token": places(("token", SIZE), ("element", DIM)),
    "element after element": places(("element", DIM), ("token", SIZE)),
    # Keys and values for AMX.
    "pairs of elements": places(("token", 2), ("element", DIM // 2), ("token", 16), ("element", 2)),
    "pairs of tokens": places(("element", 4), ("token", SIZE // 2), ("element", 16), ("token", 2)),
    "groups of elements": places(("element", 4), ("token", SIZE), ("element", 16)),
    "short groups": places(("element", DIM // 4), ("token", SIZE), ("element", 4)),
    "three tokens share": places(("token", 8), ("element", DIM), ("token", 4)),
}
every_order = pytest.mark.parametrize("name", [*ORDERS, "none"])


def order_of(name: str) -> Tensor:
    if name in ORDERS:
        return ORDERS[name]
    return torch.randperm(SIZE * DIM, generator=torch.Generator().manual_seed(0)).view(SIZE, DIM)


@every_order
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("margin", [0, 6], ids=["aligned", "pages at odd places"])
def test_tokens_are_what_lies_at_their_places(name: str, dtype: torch.dtype, margin: int) -> None:
    place, half = order_of(name), SIZE * DIM
    step = 2 * half + margin
    memory = torch.arange(PAGES * step).mul(2654435761).remainder(251).to(dtype)
    order = PageOrder(place, math.gcd(step, half), dtype.itemsize)
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(SIZE, (7, 3), generator=generator)
    begin = torch.randint(PAGES, (7, 3), generator=generator) * step + half
    found = order.take(memory, begin, slots)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, memory[begin[..., None] + place[slots]])


@every_order
def test_orders_of_kernels_are_not_fetched_element_by_element(name: str) -> None:
    assert PageOrder(order_of(name), SIZE * DIM, 2).is_regular == (name != "none")

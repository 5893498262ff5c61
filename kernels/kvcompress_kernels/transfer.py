"""Small host arrays on their way to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BORDER = 16  # bytes; what is sent together begins on such borders


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; itself if that is the CPU.

    To a GPU it goes from pinned memory: a copy from pageable memory would wait for the device.
    Nothing is mutated; on a GPU the caller may change ``host`` at once.

    Args:
        host: On the CPU.
        device: Where it is wanted.

    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Sent:
    """An array that is on its way to a device, or already there.

    Args:
        shape: Of the array.
        fetch: Returns it on the device.

    """

    def __init__(self, shape: tuple[int, ...], fetch: Callable[[], Tensor]) -> None:
        self.shape = shape
        self._fetch = fetch

    def on_device(self) -> Tensor:
        """Return it on the device; what is with it in a :class:`Parcel` is sent now at the latest.

        Nobody may change it.
        """
        return self._fetch()

    def rows(self, first: int, stop: int) -> Sent:
        """Return some of its rows, on their way as it is."""
        return Sent((stop - first, *self.shape[1:]), lambda: self._fetch()[first:stop])


class Parcel:
    """Small host arrays that go to a device in one copy.

    They are sent when the first of them is needed there. What is added later goes with the next
    copy.

    Args:
        device: Where they go.

    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: list[tuple[int, npt.NDArray[Any]]] = []
        self._arrived: dict[int, Tensor] = {}
        self._added = 0

    def add(self, array: npt.NDArray[Any]) -> Sent:
        """Put an array in, which must not be changed any more. Mutates the parcel."""
        number, self._added = self._added, self._added + 1
        self._waiting.append((number, array))

        def fetch() -> Tensor:
            if number not in self._arrived:
                self._send()
            return self._arrived[number]

        return Sent(array.shape, fetch)

    def _send(self) -> None:
        starts, end = [], 0
        for _, array in self._waiting:
            starts.append(end)
            end += -(-array.nbytes // _BORDER) * _BORDER
        packed = np.zeros(end, dtype=np.uint8)
        for start, (_, array) in zip(starts, self._waiting, strict=True):
            flat = np.ascontiguousarray(array).reshape(-1)
            packed[start : start + array.nbytes] = flat.view(np.uint8)
        whole = upload(torch.from_numpy(packed), self.device)
        for start, (number, array) in zip(starts, self._waiting, strict=True):
            dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
            own = whole[start : start + array.nbytes].view(dtype)
            self._arrived[number] = own.view(array.shape)
        self._waiting = []


def on_device(array: Tensor | Sent) -> Tensor:
    """Return a tensor, or what is on its way, on the device."""
    return array.on_device() if isinstance(array, Sent) else array

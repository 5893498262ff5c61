"""Small host arrays on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


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

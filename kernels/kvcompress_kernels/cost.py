"""The least that a kernel has to move and to compute, as a function of its shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call, counted from the algorithm and not from an implementation.

    Attributes:
        bytes: Bytes read from device memory plus bytes written to it, each operand once.
        flops: Floating-point operations; a multiply-add counts as two.

    """

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both, one after the other."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor_seconds(self, bandwidth: float, flop_rate: float) -> float:
        """Return the time below which no implementation can come on a device.

        Memory traffic and arithmetic are assumed to overlap perfectly.

        Args:
            bandwidth: Bytes per second.
            flop_rate: Floating-point operations per second.

        Raises:
            ValueError: One of them is not positive.

        """
        if bandwidth <= 0 or flop_rate <= 0:
            raise ValueError(f"rates must be positive: {bandwidth} bytes/s, {flop_rate} flop/s")
        return max(self.bytes / bandwidth, self.flops / flop_rate)

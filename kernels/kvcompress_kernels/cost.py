"""What a kernel has to move and compute at the least, as a function of its shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call, counted from the algorithm and not from an implementation.

    ``bytes``: bytes read from plus bytes written to device memory, each operand once.
    ``flops``: floating-point operations, a multiply-add counted as two.
    """

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """Cost of both, one after the other."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor_seconds(self, bandwidth: float, flop_rate: float) -> float:
        """Time below which no implementation can come on a device.

        ``bandwidth``: bytes per second; ``flop_rate``: operations per second. Memory traffic and
        arithmetic are taken to overlap perfectly. Raises ValueError unless both are positive.
        """
        if bandwidth <= 0 or flop_rate <= 0:
            raise ValueError(f"rates must be positive: {bandwidth} bytes/s, {flop_rate} flop/s")
        return max(self.bytes / bandwidth, self.flops / flop_rate)

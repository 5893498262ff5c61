"""Rounding of integer counts."""

__all__ = ["cdiv"]


def cdiv(a: int, b: int) -> int:
    """Divide two integers and round the quotient up.

    Args:
        a: Dividend, of any sign.
        b: Divisor, at least 1.

    Returns:
        The smallest integer that is at least ``a / b``.

    """
    return -(-a // b)

"""Rounding of integer counts."""


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up, for ``a`` of any sign and ``b`` of at least 1."""
    return -(-a // b)

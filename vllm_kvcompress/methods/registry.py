"""Methods by name: the built-in ones and those of other packages.

Another package adds a method by an entry point in the group ``vllm_kvcompress.methods`` whose
object is a ``Method`` sub-class; its ``name`` counts, and a built-in name cannot be taken over.
Entry points are read at the first question only, so importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from .base import Method

ENTRY_POINT_GROUP = "vllm_kvcompress.methods"

_methods: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: make a method known by its ``name``.

    Registering the same class again is harmless. Raises ValueError if another class has the name.
    """
    known = _methods.setdefault(method.name, method)
    if known is not method:
        raise ValueError(
            f'the method name "{method.name}" is taken by {known.__module__}.{known.__qualname__}'
        )
    return method


@cache
def _load_third_party() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        method = entry.load()
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ValueError(f"entry point {entry.name} ({entry.value}) is not a Method sub-class")
        register(method)


def available() -> tuple[str, ...]:
    """Names of all known methods, sorted."""
    _load_third_party()
    return tuple(sorted(_methods))


def get_method(name: str, params: Mapping[str, object]) -> Method:
    """Build the method ``name`` with ``params`` (field name to value; the rest keep defaults).

    Raises ValueError, one sentence each, for an unknown method, an unknown parameter and a value
    of the wrong type or out of range.
    """
    if name not in available():
        raise ValueError(f'unknown method "{name}", known are {", ".join(available())}')
    method = _methods[name]
    accepted = sorted(field.name for field in fields(method) if field.init)
    for param in params:
        if param not in accepted:
            raise ValueError(
                f'{name}: unknown parameter "{param}", accepted are {", ".join(accepted)}'
            )
    # The dataclass checks every value in __post_init__, so the untyped mapping is safe here.
    return method(**dict(params))  # type: ignore[arg-type]

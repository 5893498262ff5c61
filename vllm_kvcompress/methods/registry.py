"""Methods by name: the built-in ones, those of other packages, and compositions of their parts.

Another package adds a method by an entry point in the group ``vllm_kvcompress.methods`` whose
object is a ``Method`` sub-class; its ``name`` counts, and a built-in name cannot be taken over.
WorkerRequest points are read at the first question only, so importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from typing import TypeVar

from vllm_kvcompress.methods.base import Method
from vllm_kvcompress.methods.composed import Composed, check_composable

ENTRY_POINT_GROUP = "vllm_kvcompress.methods"

ROLES = ("scorer", "allocator")
"""Parameters of every method that can be composed: whose part replaces its own."""

_methods: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: make a method known by its ``name``.

    Registering the same class again is harmless. Raises ValueError if another class has the name,
    or if a field is called like one of ``ROLES``.
    """
    for role in ROLES:
        if role in _parameters(method):
            raise ValueError(f"{method.name}: the parameter name {role} is reserved")
    known = _methods.setdefault(method.name, method)
    if known is not method:
        raise ValueError(
            f'the method name "{method.name}" is taken by {known.__module__}.{known.__qualname__}'
        )
    return method


@cache
def _load_third_party() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register_entry(entry)


def register_entry(entry: EntryPoint) -> None:
    """Load and register the method that an entry point of another package names.

    Raises ValueError, one sentence that names the entry point and its package, if it cannot be
    loaded, is no usable method, or has a name that is taken.
    """
    package = entry.dist.name if entry.dist else "its package"
    where = f'entry point "{entry.name} = {entry.value}" of {package}'
    try:
        method = entry.load()
    except Exception as error:  # whatever a foreign module raises while it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{where} cannot be loaded ({cause}); repair or uninstall {package}"
        ) from error
    if not (isinstance(method, type) and issubclass(method, Method)) or isabstract(method):
        raise ValueError(
            f"{where} must be a sub-class of vllm_kvcompress.methods.Method that has a score, "
            f"got {method!r}"
        )
    for name, kind in (("name", str), ("needs", frozenset)):
        if not isinstance(getattr(method, name, None), kind):
            raise ValueError(
                f"{where} must have a class attribute {name} of type {kind.__name__}, "
                f"got {getattr(method, name, None)!r}"
            )
    try:
        register(method)
    except ValueError as error:
        raise ValueError(f"{where} is refused: {error}") from None


def available() -> tuple[str, ...]:
    """Names of all known methods, sorted."""
    _load_third_party()
    return tuple(sorted(_methods))


def get_method(name: str, params: Mapping[str, object]) -> Method:
    """Build the method ``name`` with ``params`` (field name to value; the rest keep defaults).

    ``scorer`` and ``allocator`` among the ``params`` replace that part of the method by another
    method's: a name, or a mapping ``{"method": name, **its parameters}``. The parts share the
    window of the method ``name``, and the result is a :class:`Composed`.

    Raises ValueError, one sentence each, for an unknown method, an unknown parameter, a value of
    the wrong type or out of range, and parts that cannot be combined.
    """
    own = {key: value for key, value in params.items() if key not in ROLES}
    whole = _build(name, own)
    replaced = {role: params[role] for role in ROLES if role in params}
    if not replaced:
        return whole
    check_composable(whole)
    idle = sorted(own.keys() - {"window"})
    if len(replaced) == len(ROLES) and idle:
        raise ValueError(
            f"{name}: {idle[0]} has no effect, as scorer and allocator are both replaced and only "
            f"the window is shared, got {own[idle[0]]!r}"
        )
    parts = {}
    for role, given in replaced.items():
        _check_idle(whole, own, role, f"the {role} is replaced")
        parts[role] = _part(whole, role, given)
    return Composed(
        window=whole.window,
        scorer=parts.get("scorer", whole),
        allocator=parts.get("allocator", whole),
    )


def _part(whole: Method, role: str, given: object) -> Method:
    """The method whose part replaces one of ``whole``, with the window of ``whole``."""
    own = dict(given) if isinstance(given, Mapping) else {"method": given}
    name = own.pop("method", None)
    if not isinstance(name, str):
        raise ValueError(
            f'{whole.name}: {role} must be the name of a method or a mapping {{"method": name, '
            f"...}} with its parameters, got {given!r}"
        )
    if "window" in own:
        raise ValueError(
            f"{whole.name}: {role} must not have a window, as all parts share the method's window "
            f"of {whole.window}, got {own['window']!r}"
        )
    part = _build(name, {"window": whole.window, **own}, part=True)
    (other,) = set(ROLES) - {role}
    _check_idle(part, own, other, f"only its {role} is used")
    return part


def _check_idle(method: Method, given: Mapping[str, object], role: str, reason: str) -> None:
    """ValueError if a parameter is given that only an unused part of the method reads."""
    idle = method.scorer_params if role == "scorer" else method.allocator_params
    for name in sorted(idle & given.keys()):
        raise ValueError(f"{method.name}: {name} has no effect, as {reason}, got {given[name]!r}")


def _build(name: str, params: Mapping[str, object], *, part: bool = False) -> Method:
    if name not in available():
        raise ValueError(f'unknown method "{name}", known are {", ".join(available())}')
    method = _methods[name]
    parameters = _parameters(method)
    for param in params:
        if param not in parameters:
            known = set(parameters)
            known = known - {"window"} if part else known.union(() if method.keeps_all else ROLES)
            raise ValueError(
                f'{name}: unknown parameter "{param}", '
                f"accepted are {', '.join(sorted(known)) or 'none'}"
            )
    # The dataclass checks every value in __post_init__, so the untyped mapping is safe here.
    return method(**dict(params))  # type: ignore[arg-type]


def _parameters(method: type[Method]) -> list[str]:
    return [field.name for field in fields(method) if field.init]

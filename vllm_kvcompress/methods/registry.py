"""Methods by name: the built-in ones, those of other packages, and compositions of their parts.

Another package adds a method by an entry point in the group ``vllm_kvcompress.methods`` whose
object is a :class:`MethodSpec`; its ``name`` counts, and a built-in name cannot be taken over.
Entry points are read at the first question only, so importing this module stays cheap.
"""

from collections.abc import Collection, Mapping
from dataclasses import MISSING
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract

from vllm_kvcompress.methods.cake import Cake
from vllm_kvcompress.methods.dynamickv import DynamicKV
from vllm_kvcompress.methods.h2o import H2O
from vllm_kvcompress.methods.keep_all import NoCompression, Scatter
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import Knorm
from vllm_kvcompress.methods.method import ROLES, Method, MethodSpec
from vllm_kvcompress.methods.parts import Allocator, Inseparable, Scorer
from vllm_kvcompress.methods.pyramidkv import PyramidKV
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.methods.streamingllm import StreamingLLM
from vllm_kvcompress.methods.tova import Tova
from vllm_kvcompress.methods.uniform import Uniform

METHOD_API = 1
"""Version of what ``vllm_kvcompress.methods`` exports for methods of other packages.

It goes up when a method written for the version before may no longer work.
"""

ENTRY_POINT_GROUP = "vllm_kvcompress.methods"

BUILT_IN = (
    Cake, DynamicKV, H2O, KeyDiff, Knorm, NoCompression, PyramidKV, Random, Scatter, SnapKV,
    StreamingLLM, Tova, Uniform,
)  # fmt: skip

_methods: dict[str, MethodSpec] = {spec.name: spec for spec in BUILT_IN}


def register(spec: MethodSpec) -> MethodSpec:
    """Make a method of another package known by its name; harmless the second time.

    Args:
        spec: Its ``api`` says which :data:`METHOD_API` it was written for.

    Raises:
        ValueError: It was written for another version, has no usable parts, or a parameter or the
            method itself has a name that is taken.

    """
    if not isinstance(spec.name, str):
        raise ValueError(f"the name of a method must be a string, got {spec.name!r}")
    if spec.api != METHOD_API:
        raise ValueError(
            f"{spec.name} is written for method API {spec.api}, and here it is {METHOD_API}: "
            f"adapt it as docs/adding-a-method.md describes and give its MethodSpec "
            f"api={METHOD_API}"
        )
    for role, base in (("scorer", Scorer), ("allocator", Allocator)):
        part = getattr(spec, role)
        if not (isinstance(part, type) and issubclass(part, base)) or isabstract(part):
            raise ValueError(
                f"{spec.name}: its {role} must be a complete sub-class of {base.__name__}, "
                f"got {part!r}"
            )
        if not isinstance(part.needs, frozenset):
            raise ValueError(
                f"{spec.name}: needs of its {role} must be a frozenset, got {part.needs!r}"
            )
    for param, default in spec.parameters.items():
        if param in ROLES:
            raise ValueError(f"{spec.name}: the parameter name {param} is reserved")
        if default is MISSING:
            raise ValueError(f"{spec.name}: the parameter {param} needs a default")
    known = _methods.setdefault(spec.name, spec)
    if known is not spec:
        raise ValueError(
            f'the method name "{spec.name}" is taken by {known.scorer.__module__}.'
            f"{known.scorer.__qualname__}"
        )
    return spec


@cache
def _load_third_party() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register_entry(entry)


def register_entry(entry: EntryPoint) -> None:
    """Load and register the method that an entry point of another package names.

    Raises:
        ValueError: One sentence that names the entry point and its package, if it cannot be loaded
            or :func:`register` refuses it.

    """
    package = entry.dist.name if entry.dist else "its package"
    where = f'entry point "{entry.name} = {entry.value}" of {package}'
    try:
        spec = entry.load()
    except Exception as error:  # whatever a foreign module raises while it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{where} cannot be loaded ({cause}); repair or uninstall {package}"
        ) from error
    if not isinstance(spec, MethodSpec):
        raise ValueError(
            f"{where} must be a vllm_kvcompress.methods.MethodSpec (method API {METHOD_API}), "
            f"got {spec!r}"
        )
    try:
        register(spec)
    except ValueError as error:
        raise ValueError(f"{where} is refused: {error}") from None


def available() -> tuple[str, ...]:
    """Names of all known methods, sorted."""
    _load_third_party()
    return tuple(sorted(_methods))


def get_spec(name: str) -> MethodSpec:
    """Return what users call ``name``; raises ValueError if there is no such method."""
    if name not in available():
        raise ValueError(f'unknown method "{name}", known are {", ".join(available())}')
    return _methods[name]


def get_method(name: str, params: Mapping[str, object]) -> Method:
    """Build a method.

    Args:
        name: Of the method.
        params: Its parameters; the rest keep their defaults. ``scorer`` and ``allocator`` among
            them replace that part by another method's: a name, or a mapping ``{"method": name,
            **its parameters}``. Both parts have the window of the method ``name``.

    Raises:
        ValueError: One sentence for an unknown method, an unknown parameter, a value of the wrong
            type or out of range, and parts that cannot be combined.

    """
    spec = get_spec(name)
    own = {key: value for key, value in params.items() if key not in ROLES}
    whole = spec.build(own)
    replaced = [role for role in ROLES if role in params]
    if not replaced:
        return whole
    _check_separable(name, type(whole.scorer))
    if len(replaced) == len(ROLES):
        reason = "scorer and allocator are both replaced and only the window is shared"
        _refuse(name, own, own.keys() - {"window"}, reason)
    parts = dict.fromkeys(ROLES, whole)
    for role in replaced:
        _refuse(name, own, spec.parameters_of(role), f"the {role} is replaced")
        parts[role] = _build_part(whole, role, params[role])
    scorer, allocator = (parts[role] for role in ROLES)
    return Method(f"{scorer.name}+{allocator.name}", scorer.scorer, allocator.allocator)


def _build_part(whole: Method, role: str, given: object) -> Method:
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
    spec = get_spec(name)
    spec.check_names(own, part=True)
    _check_separable(name, spec.scorer)
    method = spec.build({"window": whole.window, **own})
    _check_separable(name, type(method.scorer))
    (other,) = set(ROLES) - {role}
    _refuse(name, own, spec.parameters_of(other), f"only its {role} is used")
    return method


def _refuse(name: str, given: Mapping[str, object], idle: Collection[str], reason: str) -> None:
    """ValueError if a parameter is given that nobody reads."""
    for param in sorted(given.keys() & idle):
        raise ValueError(f"{name}: {param} has no effect, as {reason}, got {given[param]!r}")


def _check_separable(name: str, scorer: type[Scorer]) -> None:
    if issubclass(scorer, Inseparable):
        raise ValueError(
            f"{name}: it cannot be combined with the scorer or allocator of another method, "
            "as it keeps everything, evicts token by token or is faithful to released code"
        )

"""Wrapping functions of vLLM, and comparing the installed vLLM with what is relied on.

What is relied on stands in hook_table.py. This module imports nothing of vLLM: every process that
has the plugin loads it, also with compression off.
"""

import dis
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

_MARK = "_kv_compression_wrapped"


class Use(Enum):
    """What we do with a name of vLLM's, and what the table says of it.

    Attributes:
        WRAP: We put a function of ours around it. The table has all its parameters.
        OVERRIDE: A class of ours has a method in its place. The table has all its parameters.
        CALL: We call it. The table has what we pass, by position or (``name=``) by name.
        SUBCLASS: We derive from it. The table has attributes that we read, set or replace.
        READ: We name it, and use these attributes.

    """

    WRAP = "wrap"
    OVERRIDE = "override"
    CALL = "call"
    SUBCLASS = "subclass"
    READ = "read"


HookTable = Mapping[str, Mapping[str, tuple[Use, str]]]
"""vLLM's module -> name in it -> its use, and parameters ("a, b") or attributes ("a b").

Parameters that end with ``...`` may be followed by others, which we hand on as they come.
"""


def wrap_once(owner: Any, name: str, make_new: Callable[[Any], Any]) -> None:
    """Replace a function of vLLM's, unless it was replaced before. Mutates the owner.

    Args:
        owner: The class, module or object that has the function.
        name: Its name there.
        make_new: Takes the original function and returns the new one. For static and class
            methods both are plain functions, the latter with the class as first parameter.

    """
    done: frozenset[str] = vars(owner).get(_MARK, frozenset())
    if name in done:
        return
    raw = vars(owner).get(name)
    bind, original = None, getattr(owner, name)
    if isinstance(raw, (staticmethod, classmethod)):
        bind, original = type(raw), raw.__func__
    new = functools.wraps(original)(make_new(original))
    setattr(owner, name, bind(new) if bind else new)
    setattr(owner, _MARK, done | {name})


def differences(table: HookTable) -> Iterator[str]:
    """Compare the installed vLLM with a table. Imports the table's modules.

    Args:
        table: What is relied on.

    Yields:
        What differs: the predicate of a sentence about vLLM, such as "it has no ...".

    """
    for module, hooks in table.items():
        for name, (use, relied_on) in hooks.items():
            try:
                value: Any = importlib.import_module(module)
                for part in name.split("."):
                    value = getattr(value, part)
            except (ImportError, AttributeError):
                yield f"it has no {module}.{name}"
                continue
            if use in (Use.SUBCLASS, Use.READ):
                missing = [a for a in relied_on.split() if not has_attribute(value, a)]
                difference = f"{name} has no attribute {missing[0]}" if missing else None
            else:
                difference = _difference(name, inspect.signature(value), use, relied_on)
            if difference is not None:
                yield difference


def has_attribute(value: Any, name: str) -> bool:
    """Whether a value, or a class's instances, have an attribute of that name."""
    if hasattr(value, name):
        return True
    for cls in inspect.getmro(value) if inspect.isclass(value) else ():
        if name in inspect.get_annotations(cls):
            return True
        for method in map(inspect.unwrap, filter(inspect.isfunction, vars(cls).values())):
            if name in method.__code__.co_names and any(
                step.opname == "STORE_ATTR" and step.argval == name
                for step in dis.get_instructions(method)
            ):
                return True
    return False


def parameter_names(signature: inspect.Signature) -> list[str]:
    """Names of parameters in their order; ``*`` stands before those that only have names."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(n[0] == "*" for n in names):
            names.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        names.append(("**" if parameter.kind is parameter.VAR_KEYWORD else star) + parameter.name)
    return names


def _difference(name: str, signature: inspect.Signature, use: Use, relied_on: str) -> str | None:
    wanted = relied_on.split(", ") if relied_on else []
    found = parameter_names(signature)
    says = f"{name} has parameters ({', '.join(found)})"
    if use is not Use.CALL:
        open_ended = wanted[-1:] == ["..."]
        same = found[: len(wanted) - 1] == wanted[:-1] if open_ended else found == wanted
        return None if same else f"{says}, not ({relied_on})"
    by_name = [argument[:-1] for argument in wanted if argument[-1] == "="]
    by_position = wanted[: len(wanted) - len(by_name)]
    try:
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except TypeError:
        fits = False
    else:
        fits = found[: len(by_position)] == by_position
    return None if fits else f"{says} and is called with ({relied_on})"

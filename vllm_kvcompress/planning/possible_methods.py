"""The methods that requests of a server can have: one for each way in which their work differs.

A kernel is compiled for what is constant in it. What requests may choose without bound (the window,
the width of a pooling) is no constant of a kernel of ours; what they choose from a few values is.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import product
from typing import Any, Literal, get_args, get_origin

from vllm_kvcompress.methods import Method, available, get_method, get_spec
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.planning.config import KVCompressionConfig


def possible_methods(config: KVCompressionConfig, largest_window: int) -> Iterator[Method]:
    """Yield methods that together do all that the methods of a server's requests do.

    Choices that a method offers, words and switches, are combined with each other; numbers are not
    varied, but for the window of one method that looks at its queries in a kernel: that takes all
    sizes of tiles, filled and not.

    Args:
        config: The server's settings.
        largest_window: Largest window that any request can have.

    """
    seen: list[Method] = []
    for method in _by_choices(config):
        if method not in seen and not method.scorer.keeps_all:
            seen.append(method)
            yield method
    if config.policy.most("window", largest_window) is None:
        return
    for window in tile_windows(largest_window):
        for name in available():
            observing = _or_none(name, {}, {"window": window})
            if observing is not None and observing.uses_window_statistics:
                yield observing
                break


def tile_windows(largest: int) -> list[int]:
    """Return windows of every size of tile: each power of two, and the number below it."""
    powers = [1 << bits for bits in range(largest.bit_length() + 1)]
    return sorted({w for power in powers for w in (power - 1, power) if 1 <= w <= largest})


def _by_choices(config: KVCompressionConfig) -> Iterator[Method]:
    yield config.build_method()
    for name in available():
        if name != config.method and not config.policy.allows_method(name):
            continue
        own = config.params if name == config.method else {}
        choices = _choices(config, get_spec(name))
        asked = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        if config.policy.refusal_of_param("faithful", True) is None:
            asked.append({"faithful": True})
        methods = (_or_none(name, own, params) for params in asked)
        yield from (method for method in methods if method is not None)


def _or_none(name: str, own: Mapping[str, Any], params: Mapping[str, Any]) -> Method | None:
    """The method of a request with these; None if it refuses them, as it would a request's."""
    try:
        return get_method(name, get_spec(name).override(own, params))
    except ValueError:
        return None


def _choices(config: KVCompressionConfig, spec: MethodSpec) -> Mapping[str, tuple[Any, ...]]:
    """Parameters that a request may set to one of a few values, with those values."""
    found = {}
    for param, values in _words_and_switches(spec).items():
        allowed = [v for v in values if config.policy.refusal_of_param(param, v) is None]
        if allowed:
            default = config.params.get(param, spec.parameters[param])
            found[param] = tuple(dict.fromkeys([default, *allowed]))
    return found


def _words_and_switches(spec: MethodSpec) -> Mapping[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for part in (spec.scorer, spec.allocator):
        for field in fields(part):
            if isinstance(field.default, bool):
                found[field.name] = (False, True)
            elif words := _words(field.type):
                found[field.name] = words
    return found


def _words(annotation: Any) -> tuple[Any, ...]:
    """What a ``Literal`` offers, also where a module's annotations are text; else nothing."""
    if not isinstance(annotation, str):
        return get_args(annotation) if get_origin(annotation) is Literal else ()
    text = re.fullmatch(r"(?:\w+\.)?Literal\[(.*)\]", annotation, re.DOTALL)
    return tuple(ast.literal_eval(f"({text[1]},)")) if text else ()

"""What a server lets the requests of its clients set, and within which bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vllm_kvcompress.methods.checks import LEAST_NUMBER, MOST_NUMBER
from vllm_kvcompress.planning.pinned_ranges import shown

OFF = "none"
"""Name of the method that leaves a request alone."""

DEBUGGING = frozenset({"scatter"})
"""Methods that a request may ask for only if the server names them."""

FIELDS = ("method", "budget", "params", "keep", "decode")

MOST_KERNEL = 129
"""Largest pooling width that a request may ask for where the policy sets no bound of its own."""


@dataclass(frozen=True)
class Bounds:
    """Numbers between two, both included; None leaves an end open."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None:
            return f"at most {self.high}"
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class RequestPolicy:
    """Which settings of a request are its client's to choose.

    Attributes:
        methods: Names; None for every method that does not only serve debugging.
        budget: Bounds, in tokens or as shares of the prompt; True: up to the server's own; False:
            not to be set.
        params: Parameters of methods by name and what they may be: True for whatever the method
            takes, a :class:`Bounds`, or a tuple of choices. True for all parameters.
        keep: Most prompt tokens that a request may pin; True: as many as the budget has room for;
            False: none.
        decode: Whether a request may have its generated tokens left alone, or say whether they
            compete with its prompt.

    """

    methods: frozenset[str] | None = None
    budget: Bounds | bool = True
    params: Mapping[str, "Bounds | tuple[Any, ...] | bool"] | bool = False
    keep: int | bool = False
    decode: bool = False

    @classmethod
    def parse(cls, value: object) -> "RequestPolicy":
        """Read the ``allow`` entry of the settings.

        Args:
            value: None for the default (method, and budget up to the server's own), or a mapping
                that names everything that may be set: ``method`` (true or a list of names),
                ``budget`` (true, or bounds ``{"min": ..., "max": ...}``), ``params`` (true, or per
                parameter true, bounds or a list of choices), ``keep`` (true or a number of
                tokens), ``decode`` (true). What it does not name may not be set.

        Raises:
            ValueError: One sentence that names the wrong entry, its value and what is allowed.

        """
        if value is None:
            return cls()
        if not isinstance(value, Mapping) or not set(value) <= set(FIELDS):
            raise ValueError(
                f"allow must be a mapping with keys {', '.join(FIELDS)}, got {value!r}"
            )
        return cls(
            methods=_methods(value.get("method", False)),
            budget=_budget(value.get("budget", False)),
            params=_params(value.get("params", False)),
            keep=_keep(value.get("keep", False)),
            decode=_flag("decode", value.get("decode", False)),
        )

    def allows_method(self, name: str) -> bool:
        """Whether a request may ask for a method, ``none`` included."""
        return name not in DEBUGGING if self.methods is None else name in self.methods

    def refusal_of_param(self, name: str, value: object) -> str | None:
        """Return what is wrong with a parameter that a request sets; None if nothing is."""
        rule = self._rule(name)
        if rule is False:
            return "may not be set by requests on this server"
        if isinstance(rule, Bounds):
            return None if value in rule else f"must be {rule} on this server"
        if isinstance(rule, tuple):
            choices = ", ".join(str(choice) for choice in rule)
            return None if value in rule else f"must be one of {choices} on this server"
        if isinstance(value, Mapping):
            return self._refusal_of_part(value)
        many = value if isinstance(value, list | tuple) else [value]
        return next((found for one in many if (found := _refusal_of_size(name, one))), None)

    def _refusal_of_part(self, part: Mapping[Any, object]) -> str | None:
        """What is wrong with a method that a request names in place of a number."""
        for name, value in part.items():
            if isinstance(value, Mapping):
                return f"must not hold an object under {shown(name)}"
            if name != "method" and (refusal := self.refusal_of_param(name, value)):
                return f"has {shown(name)}, which {refusal}"
        return None

    def _rule(self, name: str) -> "Bounds | tuple[Any, ...] | bool":
        return self.params if isinstance(self.params, bool) else self.params.get(name, False)

    def most(self, name: str, unbounded: float) -> float | None:
        """Return the largest number that a parameter may be set to; None if it may not be set."""
        rule = self._rule(name)
        if rule is False:
            return None
        if isinstance(rule, Bounds):
            return unbounded if rule.high is None else rule.high
        if rule is True:
            return unbounded
        return max((c for c in rule if isinstance(c, int | float)), default=None)


def _refusal_of_size(name: str, value: object) -> str | None:
    if isinstance(value, Mapping | list | tuple):
        return "must not be nested"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None  # the method's to judge
    if value != 0 and not LEAST_NUMBER <= abs(value) <= MOST_NUMBER:
        return f"must be 0 or {LEAST_NUMBER:g} to {MOST_NUMBER} in size"
    if name == "kernel" and value > MOST_KERNEL:
        return f"must be at most {MOST_KERNEL} on this server"
    return None


def _methods(value: object) -> frozenset[str] | None:
    if value is True:
        return None
    if value is False:
        return frozenset()
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise ValueError(f"allow: method must be true, false or a list of names, got {value!r}")


def _budget(value: object) -> Bounds | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return _range("budget", value)
    raise ValueError(
        f'allow: budget must be true, false or bounds such as {{"max": 1024}}, got {value!r}'
    )


def _params(value: object) -> Mapping[str, Bounds | tuple[Any, ...] | bool] | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"allow: params must be true, false or a mapping, got {value!r}")
    rules: dict[str, Bounds | tuple[Any, ...] | bool] = {}
    for name, rule in value.items():
        if isinstance(rule, bool):
            rules[name] = rule
        elif isinstance(rule, Mapping):
            rules[name] = _range(f"params: {name}", rule)
        elif isinstance(rule, list | tuple) and rule:
            rules[name] = tuple(rule)
        else:
            raise ValueError(
                f'allow: params: {name} must be true, bounds such as {{"max": 1}}, or a list of '
                f"choices, got {rule!r}"
            )
    return MappingProxyType(rules)


def _range(name: str, value: Mapping[Any, Any]) -> Bounds:
    ends = list(value.values())
    numbers = all(
        isinstance(e, int | float) and not isinstance(e, bool) and abs(e) < math.inf for e in ends
    )
    if not ends or not set(value) <= {"min", "max"} or not numbers:
        raise ValueError(
            f'allow: {name} takes bounds as finite numbers under "min", "max" or both, got '
            f"{dict(value)!r}"
        )
    low, high = value.get("min"), value.get("max")
    # A share of the prompt and a number of tokens cannot be compared.
    if low is not None and high is not None and low > high and (low < 1) == (high < 1):
        raise ValueError(f'allow: {name} needs a "min" of at most "max", got {low} and {high}')
    return Bounds(low, high)


def _keep(value: object) -> int | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value >= 0:
        return value
    raise ValueError(f"allow: keep must be true, false or a number of tokens, got {value!r}")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"allow: {name} must be true or false, got {value!r}")

"""A method: a scorer and an allocator with one window, and how users call and set it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vllm_kvcompress.methods.checks import check_bool
from vllm_kvcompress.methods.faults import check_scores
from vllm_kvcompress.methods.layer import LayerInput, LayerScores, Need
from vllm_kvcompress.methods.parts import Allocator, EqualShares, Inseparable, Part, Scorer

S = TypeVar("S", bound=Part)

ROLES = ("scorer", "allocator")
"""Parameters of every method that has two parts: what replaces one of them."""


@dataclass(frozen=True)
class Method:
    """What the engine compresses with. What depends on one part is asked of it.

    Attributes:
        name: As it is logged; "scorer+allocator" if the parts come from two methods.
        scorer: Ranks the tokens of a layer.
        allocator: Divides the pool between the layers.

    Raises:
        ValueError: The parts have different windows.

    """

    name: str
    scorer: Scorer
    allocator: Allocator

    def __post_init__(self) -> None:
        if self.scorer.window != self.allocator.window:
            raise ValueError(
                f"{self.name}: both parts share one window, got {self.scorer.window} for the "
                f"scorer and {self.allocator.window} for the allocator"
            )

    @property
    def window(self) -> int:
        return self.scorer.window

    @property
    def needs(self) -> frozenset[Need]:
        return self.scorer.needs | self.allocator.needs

    @property
    def uses_window_statistics(self) -> bool:
        return self.scorer.uses_window_statistics or self.allocator.uses_window_statistics

    def score(self, layer: LayerInput) -> LayerScores:
        """Return the tokens' worth by the scorer and the allocator's statistics of a layer.

        Raises:
            MethodError: They are not what the parts are to return.

        """
        tokens, stats = self.scorer.score(layer), self.allocator.stats(layer)
        check_scores(self.name, layer.layer, tokens, stats, (layer.num_kv_heads, layer.history))
        return LayerScores(tokens, stats)

    def select(self, scores: LayerScores, count: int) -> Tensor:
        return self.scorer.select(scores.tokens, count)

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        return self.allocator.weights(seen, base=base, num_layers=num_layers)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method as users name it. Its parameters are the fields of its parts.

    Called with parameters, it makes the :class:`Method`.

    Attributes:
        name: What users write.
        scorer: Class of the scorer; an :class:`Inseparable` is its own allocator.
        allocator: Class of the allocator.
        faithful: Takes the place of both if the parameter ``faithful`` is true, which only methods
            with this class have: the released code's arithmetic.
        window: Default of the parameter ``window``.
        api: ``METHOD_API`` that a method of another package was written for.

    """

    name: str
    scorer: type[Scorer]
    allocator: type[Allocator] = EqualShares
    faithful: type[Inseparable] | None = None
    window: int = 32
    api: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters with their defaults."""
        found = {"window": self.window, **_parameters(self.scorer), **_parameters(self.allocator)}
        return found if self.faithful is None else {**found, "faithful": False}

    def parameters_of(self, role: str) -> set[str]:
        """Return the parameters that only the scorer, or only the allocator, reads."""
        read = {
            "scorer": set(_parameters(self.scorer)),
            "allocator": set(_parameters(self.allocator)),
        }
        (other,) = set(ROLES) - {role}
        return read[role] - read[other]

    def build(self, params: Mapping[str, Any]) -> Method:
        """Make the method.

        Args:
            params: Values by name; the rest keep their defaults.

        Raises:
            ValueError: One sentence for an unknown name, a wrong value, or a value that has no
                effect beside the others.

        """
        scorer, allocator = self._parts(params)
        for name, reason in _idle(scorer, allocator).items():
            if name in params:
                raise ValueError(
                    f"{self.name}: {name} has no effect, as {reason}, got {params[name]!r}"
                )
        return Method(self.name, scorer, allocator)

    def override(self, params: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Put parameters in the place of others.

        Args:
            params: Those that are replaced: a server's.
            own: Those that replace them: a request's.

        Returns:
            Both, without those of ``params`` that have no effect beside ``own``.

        Raises:
            ValueError: As :meth:`build`, but for those that are dropped.

        """
        replaced = {name for role in ROLES if role in own for name in self.parameters_of(role)}
        merged = {**{k: v for k, v in params.items() if k not in replaced}, **own}
        idle = _idle(*self._parts({k: v for k, v in merged.items() if k not in ROLES}))
        return {k: v for k, v in merged.items() if k in own or k not in idle}

    def _parts(self, params: Mapping[str, Any]) -> tuple[Scorer, Allocator]:
        self.check_names(params)
        given = {"window": self.window, **params}
        faithful = given.pop("faithful", False)
        try:
            check_bool("faithful", faithful)
            scorer = _make(self.faithful if faithful and self.faithful else self.scorer, given)
            if isinstance(scorer, Inseparable):
                return scorer, scorer
            return scorer, _make(self.allocator, given)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def __call__(self, **params: Any) -> Method:
        """Make the method, as :meth:`build` does."""
        return self.build(params)

    def check_names(self, params: Collection[str], *, part: bool = False) -> None:
        """Refuse unknown parameters, of the whole method or where one part of it is used."""
        known = set(self.parameters)
        for param in params:
            if param not in known:
                roles = () if issubclass(self.scorer, Inseparable) else ROLES
                accepted = known - {"window"} if part else known.union(roles)
                raise ValueError(
                    f'{self.name}: unknown parameter "{param}", '
                    f"accepted are {', '.join(sorted(accepted)) or 'none'}"
                )


def _parameters(part: type[Part]) -> dict[str, Any]:
    """The fields of a part with their defaults, but for the window."""
    return {f.name: f.default for f in fields(part) if f.init and f.name != "window"}


def _idle(scorer: Scorer, allocator: Allocator) -> dict[str, str]:
    """Parameters that no part reads, each with the reason."""
    found: dict[str, str] = {}
    for part, other in ((scorer, allocator), (allocator, scorer)):
        read = {"window", *_parameters(type(other))} - set(other.idle())
        found |= {name: reason for name, reason in part.idle().items() if name not in read}
    return found


def _make(part: type[S], given: Mapping[str, Any]) -> S:
    names = ("window", *_parameters(part))
    return part(**{name: given[name] for name in names if name in given})

"""The two parts of a method: a scorer ranks the tokens, an allocator divides the pool."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvcompress_kernels.dispatch import use_triton
from kvcompress_kernels.selection import select_tokens, top_tokens
from vllm_kvcompress.methods.checks import check_int
from vllm_kvcompress.methods.layer import LayerInput, LayerScores, Need


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """What a scorer and an allocator have in common.

    The fields of a part are parameters that users set. Sub-classes give theirs defaults, and check
    them in ``__post_init__`` after ``super().__post_init__()``.

    A part sees one layer of one request at a time and never the engine, so its results cannot
    depend on what else is in the batch.

    Attributes:
        needs: What the part reads of a layer.
        least_window: Smallest window the part works with.
        window: Tokens at the end of a prompt that are always kept; both parts have the same.

    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    least_window: ClassVar[int] = 1

    window: int

    def __post_init__(self) -> None:
        check_int("window", self.window, self.least_window)

    @property
    def uses_window_statistics(self) -> bool:
        """Whether the part calls :func:`~vllm_kvcompress.methods.reads.observe`.

        On a GPU the statistics then come from a kernel that reads the pages in place.
        """
        return False

    def idle(self) -> Mapping[str, str]:
        """Parameters that nothing reads beside the values of the others, each with the reason.

        A user who sets one of them is told so, as the setting would do nothing.
        """
        return {}


class Scorer(Part):
    """Says what each token is worth, and chooses the tokens of a layer.

    Attributes:
        keeps_all: Nothing is ever evicted, and ``score`` never called.
        stores_by_worth: Survivors are stored with the best first, not in the order of the text. It
            decides which tokens are neighbours when scores are pooled at a later cut.
        token_by_token: Cuts while generating come after every token and are judged by its query
            alone, not after many tokens by the last ``window`` queries.

    """

    keeps_all: ClassVar[bool] = False
    stores_by_worth: ClassVar[bool] = False
    token_by_token: ClassVar[bool] = False

    @abstractmethod
    def score(self, layer: LayerInput) -> Tensor:
        """Return the worth of each history token for each KV head, fp32 [N, S']; S' >= 1."""

    def select(self, tokens: Tensor, count: int) -> Tensor:
        """Choose the history tokens that a layer keeps.

        Args:
            tokens: fp32 [N, S'], as from ``score``.
            count: Tokens to keep.

        Returns:
            int64 [N, count], ascending ids, each once per head.

        """
        return top_tokens(tokens, count)

    def select_layers(self, tokens: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """``select`` for several layers of one prompt, in one launch on an accelerator."""
        if self.selects_itself or not use_triton(tokens[0], "auto"):
            return [self.select(layer, count) for layer, count in zip(tokens, counts, strict=True)]
        ids = select_tokens([layer.float() for layer in tokens], counts)
        return [ids[layer, :, :count] for layer, count in enumerate(counts)]

    @property
    def selects_itself(self) -> bool:
        """Whether it chooses by code of its own."""
        own = type(self)
        return own.select is not Scorer.select or own.select_layers is not Scorer.select_layers

    @property
    def budgets_are_nested(self) -> bool:
        """Whether a layer with a smaller budget keeps the best tokens of a larger one.

        A cascade cuts a layer again and again and relies on it. It holds for ``select`` as it is.
        """
        return type(self).select is Scorer.select


@dataclass(frozen=True)
class StagedDivision:
    """Divisions of one request's pool, after more and more of its layers.

    Attributes:
        layers: Scores of all layers, with ``stats`` as numbers.
        stages: Per division the number of layers seen, ascending.
        base: History tokens that an average layer is to keep.

    """

    layers: Sequence[LayerScores]
    stages: Sequence[int]
    base: int


class Allocator(Part):
    """Says how much of the pool each layer deserves, and after which layers it is divided.

    Attributes:
        budgets_ignore_scores: ``weights`` looks at no scores and no ``stats``, so budgets are
            known before any layer has run.
        ratios_are_fixed: The ratio of two layers' weights stays the same when further layers are
            seen, so one division after the last layer gives what repeated ones would.

    """

    budgets_ignore_scores: ClassVar[bool] = False
    ratios_are_fixed: ClassVar[bool] = False

    @property
    def layers_per_division(self) -> int:
        """The pool is divided after every so many layers; 0: once, after the last."""
        return 0

    def stats(self, layer: LayerInput) -> Mapping[str, float | Tensor]:
        """Return what ``weights`` reads of a layer besides its scores (``LayerScores.stats``)."""
        return {}

    @abstractmethod
    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        """Return relative budgets of the layers seen so far.

        Args:
            seen: Their scores, with ``stats`` as numbers.
            base: History tokens that an average layer is to keep.
            num_layers: Number of all layers.

        Returns:
            fp64 [len(seen)], finite and >= 0; all zero means an even split.

        """

    def weights_by_stage(
        self, divisions: Sequence[StagedDivision], *, num_layers: int
    ) -> list[list[npt.NDArray[np.float64]]]:
        """Return what ``weights`` returns at every stage of several requests' divisions.

        An allocator that has the device count can do it for all at once, and wait for it once.

        Args:
            divisions: Of requests that are divided in one step.
            num_layers: Number of all layers.

        """
        return [
            [
                self.weights(division.layers[:seen], base=division.base, num_layers=num_layers)
                for seen in division.stages
            ]
            for division in divisions
        ]

    def cap(self, history: int, base: int) -> int:
        """Return the most history tokens one layer may keep, of ``history`` that it holds."""
        return history

    def floor(self, history: int, base: int) -> int:
        """Return the history tokens each layer gets before the rest is divided."""
        return 0


class EqualShares(Allocator):
    """The same budget for every layer."""

    budgets_ignore_scores = True

    def weights(
        self, seen: Sequence[LayerScores], *, base: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        return np.ones(len(seen), dtype=np.float64)

    def cap(self, history: int, base: int) -> int:
        return min(history, base)


class Inseparable(Scorer, Allocator):
    """Scorer and allocator in one, for methods of which no composition may take one part."""

"""The tokens that methods kept of one prompt, as shares for pictures.

A share is always a share of KV heads: of one layer in the heat map, of all layers in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_kvcompress.eviction.records import CutRecord

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Run(CutRecord):
    """The tokens that one method kept of the prompt: the cut at its end."""

    @classmethod
    def of(cls, ranks: Sequence[CutRecord]) -> Run:
        """Put together what an engine's ranks recorded of one cut; each has its own KV heads."""
        layers = zip(*(rank.kept for rank in ranks), strict=True)
        kept = tuple(np.concatenate(layer) for layer in layers)
        return cls(**{**vars(ranks[0]), "kept": kept})

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.kept)

    @property
    def num_heads(self) -> int:
        """N, KV heads of a layer."""
        return int(self.kept[0].shape[0])

    @cached_property
    def lengths(self) -> Ints:
        """Tokens that every layer keeps, int64 [L]."""
        return np.array([ids.shape[1] for ids in self.kept], dtype=np.int64)

    @property
    def mean_length(self) -> float:
        """Tokens that a layer keeps on average: the budget that was spent."""
        return float(self.lengths.mean())

    @property
    def kept_share(self) -> float:
        """Kept entries over all entries that the uncompressed cache would hold."""
        return self.mean_length / self.prompt_len

    @cached_property
    def counts(self) -> Ints:
        """KV heads that keep each token in each layer, int64 [L, S]."""
        return np.stack([np.bincount(ids.ravel(), minlength=self.prompt_len) for ids in self.kept])

    @cached_property
    def token_share(self) -> Floats:
        """Share of layers x KV heads that keep each token, fp64 [S]."""
        share: Floats = self.counts.sum(axis=0) / (self.num_layers * self.num_heads)
        return share

    @cached_property
    def profile(self) -> dict[str, Floats]:
        """H, V and P of every layer relative to the layer with most, fp64 [L] each, in that order.

        H = exp(log_entropy) and V = exp(log_shift), of those that the layers' stats have; P is the
        preference that the budgets follow. Empty for methods without H and V.
        """
        logs = {
            symbol: np.array([s[name] for s in self.stats], dtype=np.float64)
            for symbol, name in (("H", "log_entropy"), ("V", "log_shift"))
            if self.stats and all(name in s for s in self.stats)
        }
        found = {symbol: _relative_to_largest(values) for symbol, values in logs.items()}
        if found and self.weights is not None and self.weights.max() > 0.0:
            found["P"] = self.weights / self.weights.max()
        return found


@dataclass(frozen=True)
class Inspection:
    """A prompt and what each of several methods kept of it.

    Attributes:
        model: Name of the model, for titles.
        budget: The budget as it was asked for: tokens of a layer, or a share of the prompt.
        token_ids: The prompt, int64 [S].
        pieces: Text of each token, S strings.
        runs: One for each method, at least one.
        question: Question at the end of the prompt, or empty.
        layers: Numbers in the model of the layers of the runs, where only some are compressed;
            empty: all of them.

    """

    model: str
    budget: int | float
    token_ids: Ints
    pieces: tuple[str, ...]
    runs: tuple[Run, ...]
    question: str = ""
    layers: tuple[int, ...] = ()

    @property
    def prompt_len(self) -> int:
        """S."""
        return len(self.token_ids)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.runs[0].num_layers

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The number in the model of every layer of a run, L of them."""
        return self.layers or tuple(range(self.num_layers))

    @property
    def layer_title(self) -> str:
        """Title of the axis of layers."""
        return "compressed layer" if self.layers else "layer"

    @property
    def budget_text(self) -> str:
        """The budget in words."""
        if isinstance(self.budget, float):
            return f"{self.budget:.4g} of the prompt in a layer"
        return f"{self.budget} tokens a layer"


@dataclass(frozen=True)
class Passage:
    """Tokens ``start`` to ``stop`` (excluded) and the mean share of layers x heads they have."""

    start: int
    stop: int
    share: float


def bin_edges(tokens: int, width: int) -> Ints:
    """Borders of at most ``width`` bins over ``tokens`` positions, int64 [bins + 1].

    Every bin has at least one token, and no two differ by more than one.
    """
    bins = min(tokens, width)
    return np.arange(bins + 1, dtype=np.int64) * tokens // bins


def binned(run: Run, edges: Ints) -> Floats:
    """Share of KV heads that keep a token, mean over the tokens of each bin: fp64 [L, bins]."""
    sums = np.add.reduceat(run.counts, edges[:-1], axis=1)
    means: Floats = sums / (np.diff(edges) * run.num_heads)
    return means


def passages(
    run: Run, pieces: Sequence[str], *, length: int, count: int, margin: int = 0
) -> list[Passage]:
    """The passages that are kept best, in the order of the text.

    They do not overlap, begin where a word does if they can, and leave the window out, which is
    kept anyway.

    Args:
        run: The kept tokens.
        pieces: The prompt's text by tokens.
        length: Tokens of a passage; all of the history if that is shorter.
        count: Largest number of passages.
        margin: Tokens at the prompt's beginning that are left out too (attention sinks).

    """
    end = run.prompt_len - run.window
    length = min(length, end - margin)
    if length < 1 or count < 1:
        return []
    total = np.concatenate([[0.0], np.cumsum(run.token_share)])
    starts = np.arange(margin, end - length + 1)
    means = (total[starts + length] - total[starts]) / length
    words = np.array([_starts_word(pieces, int(start)) for start in starts])
    free = words if words.any() else np.ones(len(starts), dtype=bool)
    found: list[Passage] = []
    while free.any() and len(found) < count:
        best = int(np.argmax(np.where(free, means, -1.0)))
        start = int(starts[best])
        found.append(Passage(start, start + length, float(means[best])))
        free = free & (np.abs(starts - start) >= length)
    return sorted(found, key=lambda passage: passage.start)


def _starts_word(pieces: Sequence[str], token: int) -> bool:
    piece = pieces[token]
    if piece[:1].isspace():
        return not piece.isspace()
    return token == 0 or pieces[token - 1][-1:].isspace()


def _relative_to_largest(logs: Floats) -> Floats:
    largest = logs.max()
    if largest == -np.inf:
        return np.zeros_like(logs)
    return np.exp(logs - largest)

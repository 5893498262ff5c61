"""Groups of results that may be compared: all settings of one model, length and protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import pandas as pd

from vllm_kvcompress.tools.evaluation.record import PROTOCOLS
from vllm_kvcompress.tools.evaluation.results_frame import PROMPT, cell_means
from vllm_kvcompress.tools.evaluation.stats import (
    Estimate,
    Floats,
    mean_difference,
    mean_of,
    mean_score,
)
from vllm_kvcompress.tools.evaluation.task import EvaluationError

OURS = "vllm_kvcompress"
"""First word of this package's own source."""

SETTING = ["label", "source", "block_size", "budget"]


@dataclass(frozen=True)
class SettingRow:
    """A setting without its budget: a row of the tables.

    Attributes:
        label: Label of the setting in the records.
        source: Name and version of the software that answered.
        block_size: Tokens of a block.
        full: Whether this is the full cache.

    """

    label: str
    source: str
    block_size: int
    full: bool

    @property
    def ours(self) -> bool:
        """Whether this package answered."""
        return self.source.partition(" ")[0] == OURS


@dataclass(frozen=True)
class Difference:
    """Two settings on the same prompts.

    Attributes:
        estimate: Mean over tasks of the mean difference, first minus second, of scores or of nats;
            its ``n`` is the number of prompts that both have answered.
        higher: Number of pairs where the first has the higher value.
        lower: Number of pairs where the second has the higher value.

    """

    estimate: Estimate
    higher: int
    lower: int


@dataclass(frozen=True, eq=False)
class ResultGroup:
    """Results that may be compared with each other.

    Attributes:
        model: Name of the model.
        dtype: Data type of weights and cache.
        family: The part before the slash in the tasks' names, or the only task's name.
        length: Tokens of a prompt, as asked for.
        protocol: Whether the question was compressed together with the context.
        likelihood: Whether the values are likelihoods (nats per token), not scores.
        frame: Rows of :func:`.results_frame.make_frame`, at least one.

    """

    model: str
    dtype: str
    family: str
    length: int
    protocol: str
    likelihood: bool
    frame: pd.DataFrame

    @property
    def title(self) -> str:
        """Model, tasks and protocol: all but the length."""
        return f"{self.model}, {self.dtype}: {self.family}, {self.protocol}"

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Means of every cell, as :func:`.results_frame.cell_means` gives them."""
        return cell_means(self.frame)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in alphabetical order."""
        return tuple(sorted(set(self.frame["task"])))

    @cached_property
    def rows(self) -> tuple[SettingRow, ...]:
        """Full caches first, this package's rows before others', then in the order of the frame."""
        rows = dict.fromkeys(row for row, _ in self._selections)
        return tuple(sorted(rows, key=lambda row: (not row.full, not row.ours)))

    @cached_property
    def full(self) -> SettingRow | None:
        """The full cache that others are compared with: this package's if there are several."""
        return next((row for row in self.rows if row.full), None)

    @cached_property
    def compressed(self) -> tuple[SettingRow, ...]:
        """All rows but the full caches."""
        return tuple(row for row in self.rows if not row.full)

    @cached_property
    def budgets(self) -> tuple[str, ...]:
        """All budgets but the full cache's; the one that keeps most comes first."""
        shares = self.cells[self.cells["budget"] != ""].groupby("budget")["share"].mean()
        return tuple(sorted(shares.index, key=lambda budget: (-shares[budget], budget)))

    @cached_property
    def shared(self) -> ResultGroup | None:
        """The tasks that every row has at each of its budgets; None if these are all or none."""
        found = [self.tasks_of(*key) for key in self._selections]
        tasks = set(self.tasks).intersection(*found)
        return self.only(tasks) if 0 < len(tasks) < len(self.tasks) else None

    def only(self, tasks: set[str]) -> ResultGroup:
        """The same group with some of its tasks."""
        kept = self.frame[self.frame["task"].isin(tasks)]
        return replace(self, frame=kept)

    @cached_property
    def _selections(self) -> dict[tuple[SettingRow, str], pd.DataFrame]:
        found = dict(list(by_prompt(self.frame).groupby(SETTING)))
        order = self.frame[SETTING].drop_duplicates()
        return {_key(*key): found[key] for key in order.itertuples(index=False, name=None)}

    def select(self, row: SettingRow, budget: str) -> pd.DataFrame | None:
        """Results of a row at a budget, as :func:`by_prompt` orders them; None if there are none.

        The full cache has the same results at every budget.
        """
        return self._selections.get((row, "" if row.full else budget))

    def tasks_of(self, row: SettingRow, budget: str) -> tuple[str, ...]:
        """Tasks that a row has at a budget."""
        found = self.select(row, budget)
        return () if found is None else tuple(found.index.unique("task"))

    def mean(self, row: SettingRow, budget: str) -> Estimate | None:
        """Mean over all tasks, of scores or of nats per token; None if the row lacks a task."""
        found = self.select(row, budget)
        values = [] if found is None else strata(found["value"])
        return self._estimate(values) if len(values) == len(self.tasks) else None

    def task_means(self, row: SettingRow, budget: str) -> dict[str, Estimate]:
        """Mean of each task that a row has at a budget."""
        found = self.select(row, budget)
        values = [] if found is None else strata(found["value"])
        means = (self._estimate([scores]) for scores in values)
        return dict(zip(self.tasks_of(row, budget), means, strict=True))

    def _estimate(self, values: Sequence[Floats]) -> Estimate:
        return mean_of(values) if self.likelihood else mean_score(values)

    def difference(self, row: SettingRow, budget: str, reference: SettingRow) -> Difference | None:
        """How much more a row has than ``reference`` at the same budget, on the same prompts."""
        first, second = self.select(row, budget), self.select(reference, budget)
        return None if first is None or second is None else paired(first, second)

    @cached_property
    def _shares(self) -> dict[tuple[SettingRow, str], float]:
        shares = self.cells.groupby(SETTING)["share"].mean()
        return {_key(*key): float(share) for key, share in shares.items()}

    def share(self, row: SettingRow, budget: str) -> float | None:
        """Mean over a row's tasks of the share of the cache that was kept."""
        return self._shares.get((row, budget))

    def shares(self, budget: str) -> tuple[float, float]:
        """Smallest and largest share that any row keeps at a budget."""
        found = [share for (_, kept_at), share in self._shares.items() if kept_at == budget]
        return min(found), max(found)

    @cached_property
    def names(self) -> dict[SettingRow, str]:
        """Names of the rows: the label, with the source and the block size where these differ."""
        several_sizes = len({row.block_size for row in self.compressed}) > 1
        return {row: self._name(row, several_sizes) for row in self.rows}

    def _name(self, row: SettingRow, several_sizes: bool) -> str:
        name = row.label
        first = row.source.partition(" ")[0]
        versions = {r.source for r in self.rows if r.source.partition(" ")[0] == first}
        if len(versions) > 1:
            name += f" ({row.source})"
        elif first != OURS and len({r.source for r in self.rows}) > 1:
            name += f" ({first})"
        twins = [r for r in self.rows if (r.label, r.source) == (row.label, row.source)]
        if len(twins) > 1 or (several_sizes and not row.full):
            name += f", blocks of {row.block_size}"
        return name


def _key(label: str, source: str, block_size: int, budget: str) -> tuple[SettingRow, str]:
    return SettingRow(label, source, int(block_size), full=not budget), budget


def by_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame's rows under the index ``task``, ``seed``, ``index``, in ascending order."""
    return frame.set_index(["task", *PROMPT]).sort_index()


def strata(values: pd.Series) -> list[Floats]:
    """Values of every task, for a series that :func:`by_prompt` has ordered."""
    tasks = values.index.get_level_values("task")
    return np.split(values.to_numpy(), np.flatnonzero(tasks[1:] != tasks[:-1]) + 1)


def paired(first: pd.DataFrame, second: pd.DataFrame) -> Difference | None:
    """Compare two settings on the prompts that both have answered.

    Args:
        first: Results of one setting, as :func:`by_prompt` orders them.
        second: Results of the other setting.

    Returns:
        First minus second; None if they have no prompt in common.

    Raises:
        EvaluationError: The two were asked other prompts under the same seeds and indices, as their
            numbers of tokens show.

    """
    differences = (first["value"] - second["value"]).dropna()
    if differences.empty:
        return None
    pairs = differences.groupby(level="task").size()
    ours, theirs = (
        one["prompt_tokens"].groupby(level="task").agg(["size", "sum"]).loc[pairs.index]
        for one in (first, second)
    )
    same = (ours["size"] == pairs) & (theirs["size"] == pairs)
    for task in same.index[same & (ours["sum"] != theirs["sum"])]:
        length = first["length"].iloc[0]
        sources = (one["source"].iloc[0] for one in (first, second))
        raise EvaluationError(
            f"{task} of {length} tokens: {' and '.join(sources)} were asked other prompts, so they "
            "cannot be compared; make the records of one of them anew"
        )
    scores = not first["likelihood"].iloc[0]
    return Difference(
        mean_difference(strata(differences), scores=scores),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
    )


def make_groups(frame: pd.DataFrame) -> list[ResultGroup]:
    """Divide a frame by model, protocol, data type, family, kind of value and length."""
    places = {protocol: place for place, protocol in enumerate(PROTOCOLS)}
    frame = frame.assign(
        family=frame["task"].str.partition("/")[0], place=frame["protocol"].map(places)
    )
    keys = ["model", "place", "protocol", "dtype", "family", "likelihood", "length"]
    return [
        ResultGroup(model, dtype, family, int(length), protocol, bool(likelihood), group)
        for (model, _, protocol, dtype, family, likelihood, length), group in frame.groupby(
            keys, dropna=False
        )
    ]


def by_length(groups: Sequence[ResultGroup]) -> list[list[ResultGroup]]:
    """Groups that differ only by their length, together, in their order."""
    series = groupby(groups, key=lambda group: (group.title, group.likelihood))
    return [list(members) for _, members in series]

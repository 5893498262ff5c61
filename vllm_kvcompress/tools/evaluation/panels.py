"""What stands in one table or picture: all settings of one model, length and protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vllm_kvcompress.tools.evaluation.cells import Cell, Difference, average, paired
from vllm_kvcompress.tools.evaluation.record import PROTOCOLS
from vllm_kvcompress.tools.evaluation.stats import Estimate, mean_of

OURS = "vllm_kvcompress"
"""First word of this package's own source."""


@dataclass(frozen=True)
class Row:
    """A setting without its budget.

    Attributes:
        label: As in the records.
        source: Who answered, with version.
        block_size: Tokens of a block.
        full: Whether it is the full cache.

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
class Panel:
    """Cells that may be compared with each other.

    Attributes:
        model: Its name.
        dtype: Of weights and cache.
        family: What stands before the slash in the names of the tasks, or the one task's name.
        length: Tokens asked for.
        protocol: Whether the question was compressed too.
        likelihood: Whether cells have likelihoods, else scores.
        cells: One at least.

    """

    model: str
    dtype: str
    family: str
    length: int
    protocol: str
    likelihood: bool
    cells: tuple[Cell, ...]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(sorted({cell.task for cell in self.cells}))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Full caches first, this package's rows before others', then in the order of the cells."""
        rows = dict.fromkeys(map(row_of, self.cells))
        return tuple(sorted(rows, key=lambda row: (not row.full, not row.ours)))

    @cached_property
    def full(self) -> Row | None:
        """The full cache that others are compared with: this package's if there are several."""
        return next((row for row in self.rows if row.full), None)

    @cached_property
    def compressed(self) -> tuple[Row, ...]:
        """Rows that are no full cache."""
        return tuple(row for row in self.rows if not row.full)

    @cached_property
    def budgets(self) -> tuple[str, ...]:
        """Without the full cache; what keeps most comes first."""
        shares: dict[str, list[float]] = {}
        for cell in self.cells:
            if not cell.full:
                shares.setdefault(cell.budget, []).append(cell.share)
        return tuple(sorted(shares, key=lambda b: (-sum(shares[b]) / len(shares[b]), b)))

    @cached_property
    def shared(self) -> Panel | None:
        """With the tasks that every row has at every budget of its; None if all or none are."""
        lines = [self.select(row, budget) for row in self.rows for budget in self.budgets]
        tasks = set(self.tasks).intersection(
            *({cell.task for cell in line} for line in lines if line)
        )
        if not tasks or len(tasks) == len(self.tasks):
            return None
        return replace(self, cells=tuple(cell for cell in self.cells if cell.task in tasks))

    @cached_property
    def _found(self) -> dict[tuple[Row, str], tuple[Cell, ...]]:
        found: dict[tuple[Row, str], tuple[Cell, ...]] = {}
        for cell in sorted(self.cells, key=lambda cell: cell.task):
            key = row_of(cell), cell.budget
            found[key] = (*found.get(key, ()), cell)
        return found

    def select(self, row: Row, budget: str) -> tuple[Cell, ...]:
        """Cells of a row and budget by task; the full cache's whatever the budget."""
        return self._found.get((row, "" if row.full else budget), ())

    def complete(self, row: Row, budget: str) -> bool:
        """Whether every task of the panel is there, so that means over tasks may be compared."""
        return len(self.select(row, budget)) == len(self.tasks)

    def mean(self, row: Row, budget: str) -> Estimate | None:
        """Mean over the tasks, of scores or of nats per token; None if a task is not there."""
        if not self.complete(row, budget):
            return None
        cells = self.select(row, budget)
        return mean_of([cell.nlls for cell in cells]) if self.likelihood else average(cells)

    def difference(self, row: Row, budget: str, reference: Row) -> Difference | None:
        """How much more a row has than ``reference`` at the same budget, on the same prompts."""
        return paired(self.select(row, budget), self.select(reference, budget))

    def share(self, row: Row, budget: str) -> float | None:
        """Mean over a row's tasks of the share of the cache that was kept."""
        cells = self.select(row, budget)
        return sum(cell.share for cell in cells) / len(cells) if cells else None

    def shares(self, budget: str) -> tuple[float, float]:
        """Least and greatest share that any row keeps at a budget."""
        shares = [self.share(row, budget) for row in self.compressed]
        found = [share for share in shares if share is not None]
        return min(found), max(found)

    @cached_property
    def names(self) -> dict[Row, str]:
        """What rows are called: the label, and who answered and the blocks where these differ."""
        compressed = {row.block_size for row in self.compressed}
        return {row: self._name(row, len(compressed) > 1) for row in self.rows}

    def _name(self, row: Row, sizes: bool) -> str:
        name = row.label
        first = row.source.partition(" ")[0]
        versions = {r.source for r in self.rows if r.source.partition(" ")[0] == first}
        if len(versions) > 1:
            name += f" ({row.source})"
        elif first != OURS and len({r.source for r in self.rows}) > 1:
            name += f" ({first})"
        twins = [r for r in self.rows if (r.label, r.source) == (row.label, row.source)]
        if len(twins) > 1 or (sizes and not row.full):
            name += f", blocks of {row.block_size}"
        return name


def row_of(cell: Cell) -> Row:
    """The row that a cell stands in."""
    return Row(cell.label, cell.source, cell.block_size, cell.full)


def family_of(task: str) -> str:
    """What stands before the slash, or the name of a task that has none."""
    return task.partition("/")[0]


def make_panels(cells: Iterable[Cell]) -> list[Panel]:
    """Divide cells; by model, protocol, precision, family and length."""
    groups: dict[tuple[str, str, str, str, bool, int], list[Cell]] = {}
    for cell in cells:
        family = family_of(cell.task)
        key = (cell.model, cell.protocol, cell.dtype, family, bool(cell.nlls), cell.length)
        groups.setdefault(key, []).append(cell)
    panels = []
    for model, protocol, dtype, family, likelihood, length in sorted(groups, key=_order):
        group = groups[(model, protocol, dtype, family, likelihood, length)]
        panels.append(Panel(model, dtype, family, length, protocol, likelihood, tuple(group)))
    return panels


def by_length(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels that differ only by their length, together, in their order."""
    groups: dict[tuple[str, ...], list[Panel]] = {}
    for panel in panels:
        key = (*(panel.model, panel.dtype, panel.family), panel.protocol, str(panel.likelihood))
        groups.setdefault(key, []).append(panel)
    return list(groups.values())


def _order(key: tuple[str, str, str, str, bool, int]) -> tuple[str, int, str, str, bool, int]:
    model, protocol, dtype, family, likelihood, length = key
    place = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
    return model, place, dtype, family, likelihood, length

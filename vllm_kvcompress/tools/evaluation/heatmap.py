"""The needle grid: how often a needle is found, by its depth and the length of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_kvcompress.tools.evaluation.panels import Panel, Row
from vllm_kvcompress.tools.evaluation.plots import DPI
from vllm_kvcompress.tools.evaluation.stats import Floats
from vllm_kvcompress.tools.evaluation.tables import budget_text
from vllm_kvcompress.tools.inspection.style import HEAT, shorten

_LETTERS = 9.0
_COLUMNS = 4

Grid = Mapping[tuple[float, int], tuple[float, int]]


def needle_grid(panels: Sequence[Panel], name: str, budget: str) -> Grid:
    """Mean score and prompts by depth in per cent and length, over all needle tasks.

    Args:
        panels: The lengths of one model and protocol.
        name: Of the setting, as the panels call it.
        budget: As in the cells; the full cache's are taken whatever it is.

    """
    found: dict[tuple[float, int], list[float]] = {}
    for panel in panels:
        rows = [row for row in panel.rows if panel.names[row] == name]
        for cell in (cell for row in rows for cell in panel.select(row, budget)):
            for depth, score in zip(cell.depths, cell.scores, strict=True):
                if depth is not None:
                    found.setdefault((depth, panel.length), []).append(score)
    return {key: (sum(scores) / len(scores), len(scores)) for key, scores in found.items()}


def needle_figure(panels: Sequence[Panel], budget: str) -> Figure:
    """A heat map of depth by length for every setting that has the budget, the full cache first.

    Args:
        panels: The lengths of one model and protocol, whose prompts have depths.
        budget: One of the panels'.

    """
    rows = dict.fromkeys(
        (panel.names[row], row) for panel in panels for row in _rows(panel, budget)
    )
    names = list(dict.fromkeys(name for name, _ in sorted(rows, key=lambda item: not item[1].full)))
    grids = {name: needle_grid(panels, name, budget) for name in names}
    keys = sorted({key for grid in grids.values() for key in grid})
    depths = sorted({depth for depth, _ in keys})
    lengths = sorted({length for _, length in keys})
    columns = min(_COLUMNS, len(names))
    lines = ceil(len(names) / columns)
    width, height = max(1.7, 0.42 * len(lengths) + 0.6), max(1.5, 0.24 * len(depths) + 0.6)
    size = (max(6.0, columns * width + 1.4), lines * height + 1.0)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings
    axes = []
    for number, name in enumerate(names):
        ax = figure.add_subplot(lines, columns, number + 1)
        _draw(ax, grids[name], depths, lengths)
        ax.set_title(shorten(name, int(width * 12)), fontsize=_LETTERS)
        if number % columns == 0:
            ax.set_ylabel("depth, %", fontsize=_LETTERS)
        axes.append(ax)
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.9, pad=0.015, aspect=25)
    bar.set_label("needles found, %", fontsize=_LETTERS)
    bar.ax.tick_params(labelsize=_LETTERS - 1)
    counts = sorted({count for grid in grids.values() for _, count in grid.values()})
    prompts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = (
        f"{panels[0].model}, {panels[0].protocol}, budget {budget_text(budget)}, "
        f"{prompts} prompt{'' if counts == [1] else 's'} a field"
    )
    figure.suptitle(shorten(title, int(size[0] * 12)), fontsize=_LETTERS + 2)
    figure.supxlabel("tokens of the context", fontsize=_LETTERS)
    return figure


def _rows(panel: Panel, budget: str) -> list[Row]:
    return [row for row in panel.rows if panel.select(row, budget)]


def _draw(ax: Axes, grid: Grid, depths: Sequence[float], lengths: Sequence[int]) -> None:
    values: Floats = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), (mean, _) in grid.items():
        values[depths.index(depth), lengths.index(length)] = 100 * mean
    ax.imshow(values, vmin=0, vmax=100, cmap=HEAT.lower(), aspect="auto")
    ax.set_facecolor("0.85")  # of fields without a prompt
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "black" if value > 60 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    ax.tick_params(labelsize=_LETTERS - 1.5, length=2)


def _length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)

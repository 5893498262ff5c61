"""The needle grid: how often a needle is found, by its depth and the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup
from vllm_kvcompress.tools.evaluation.tables import budget_text
from vllm_kvcompress.tools.inspection.png_file import DPI
from vllm_kvcompress.tools.inspection.style import HEAT, shorten

_LETTERS = 9.0
_COLUMNS = 4


def needle_figure(groups: Sequence[ResultGroup], budget: str) -> Figure:
    """A heat map of depth by length for every setting that has the budget, the full cache first.

    Args:
        groups: Groups of one model and protocol, one for each length, whose prompts have depths.
        budget: One of the groups' budgets.

    """
    found: dict[tuple[bool, str], list[pd.DataFrame]] = {}
    for group in groups:
        for row in group.rows:
            results = group.select(row, budget)
            if results is not None:
                found.setdefault((not row.full, group.names[row]), []).append(results)
    in_order = sorted(found.items(), key=lambda item: item[0][0])
    grids = {
        name: pd.concat(results).groupby(["depth", "length"])["value"].agg(["mean", "size"])
        for (_, name), results in in_order
    }
    names = list(grids)
    fields = pd.concat(grids.values())
    depths, lengths = (sorted(fields.index.unique(level)) for level in ("depth", "length"))
    columns = min(_COLUMNS, len(names))
    lines = ceil(len(names) / columns)
    width, height = max(1.7, 0.42 * len(lengths) + 0.6), max(1.5, 0.24 * len(depths) + 0.6)
    size = (max(6.0, columns * width + 1.4), lines * height + 1.0)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings
    axes = []
    for number, name in enumerate(names):
        ax = figure.add_subplot(lines, columns, number + 1)
        values = grids[name]["mean"].unstack("length").reindex(index=depths, columns=lengths)
        _draw(ax, 100 * values)
        ax.set_title(shorten(name, int(width * 12)), fontsize=_LETTERS)
        if number % columns == 0:
            ax.set_ylabel("depth, %", fontsize=_LETTERS)
        axes.append(ax)
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.9, pad=0.015, aspect=25)
    bar.set_label("needles found, %", fontsize=_LETTERS)
    bar.ax.tick_params(labelsize=_LETTERS - 1)
    counts = sorted(set(fields["size"]))
    prompts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = (
        f"{groups[0].model}, {groups[0].protocol}, budget {budget_text(budget)}, "
        f"{prompts} prompt{'' if counts == [1] else 's'} a field"
    )
    figure.suptitle(shorten(title, int(size[0] * 12)), fontsize=_LETTERS + 2)
    figure.supxlabel("tokens of the context", fontsize=_LETTERS)
    return figure


def _draw(ax: Axes, values: pd.DataFrame) -> None:
    """Draw per cent by depth (rows) and length (columns); fields without a prompt stay grey."""
    ax.imshow(values.to_numpy(), vmin=0, vmax=100, cmap=HEAT.lower(), aspect="auto")
    ax.set_facecolor("0.85")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if not np.isnan(value):
            color = "black" if value > 60 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(values.shape[1]), [_length(length) for length in values.columns])
    ax.set_yticks(range(values.shape[0]), [f"{depth:g}" for depth in values.index])
    ax.tick_params(labelsize=_LETTERS - 1.5, length=2)


def _length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)

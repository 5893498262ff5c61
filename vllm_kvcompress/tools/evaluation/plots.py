"""Pictures of results; every function returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, exp, log

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, SettingRow
from vllm_kvcompress.tools.evaluation.stats import Estimate
from vllm_kvcompress.tools.evaluation.styles import Style
from vllm_kvcompress.tools.evaluation.tables import budget_text, share_text, span, task_name
from vllm_kvcompress.tools.inspection.png_file import DPI
from vllm_kvcompress.tools.inspection.style import HEAT, shorten

_LETTERS = 9.0
# Inches that a legend's entry takes beside its letters, and for each of them.
_LEGEND_LINE, _LEGEND_LETTER = 0.65, 0.072
_PANEL_WIDTH, _PANEL_HEIGHT = 3.4, 3.1
_COLUMNS = 4
_DASHES = (0, (6, 3))

NOT_MEASURED = "not measured"
"""Entry of the legend for a setting that lacks a task."""

Styles = Mapping[SettingRow, Style]


def share_figure(groups: Sequence[ResultGroup], styles: Styles) -> Figure:
    """Mean over tasks against the share of the cache that was kept.

    The intervals of likelihoods are those of the paired differences to the full cache: prompts
    differ far more from each other than settings do.

    Args:
        groups: Groups with one axes each, such as the lengths of one model and protocol.
        styles: Styles of all settings of a report.

    """
    lines = ceil(len(groups) / _COLUMNS)
    columns = ceil(len(groups) / lines)
    width, height = max(5.5, columns * _PANEL_WIDTH), lines * _PANEL_HEIGHT + 0.6
    figure, axes = _grid(len(groups), columns, width, height)
    for ax, group in zip(axes, groups, strict=True):
        drawn = {row: style for row, style in styles.items() if row in group.rows}
        for place, (row, style) in enumerate(drawn.items()):
            # A factor that sets the rows' error bars beside each other.
            _line(ax, group, row, style, 1.02 ** (place - (len(drawn) - 1) / 2))
        full = group.mean(group.full, "") if group.full else None
        if group.full and full is not None:
            ax.axhline(
                _scaled(group, full.value),
                color="black",
                linestyle=_DASHES,
                linewidth=1.2,
                label=group.names[group.full],
            )
        tasks = f", {len(group.tasks)} tasks" if len(group.tasks) > 1 else ""
        ax.set_title(f"{group.length} tokens{tasks}", fontsize=_LETTERS)
        _share_axis(ax, group)
        _value_axis(ax, group)
    note = "mean over tasks, " if any(len(group.tasks) > 1 for group in groups) else ""
    note += "95 % intervals"
    if groups[0].likelihood:
        note += " of the differences to the full cache"
    _finish(figure, axes, groups[0].title, note)
    return figure


def task_figure(group: ResultGroup, budget: str, styles: Styles) -> Figure:
    """Bars per task for one budget, the full cache a black line over each task's bars.

    A bar stands on a line of its colour, which is all that there is of a value of 0; a cross is
    where nothing was measured.
    """
    rows = {row: style for row, style in styles.items() if group.tasks_of(row, budget)}
    width = 0.8 / max(1, len(rows))
    per_line = max(1, int(13 / (0.13 * len(rows) + 0.35)))
    lines = ceil(len(group.tasks) / per_line)
    per_line = ceil(len(group.tasks) / lines)
    inches = max(5.5, per_line * (0.13 * len(rows) + 0.35) + 0.8)
    figure, axes = _grid(lines, 1, inches, lines * 2.7 + 0.6)
    for number, ax in enumerate(axes):
        names = group.tasks[number * per_line : (number + 1) * per_line]
        for place, (row, style) in enumerate(rows.items()):
            found = group.task_means(row, budget)
            spots = [(x, e) for x, name in enumerate(names) if (e := found.get(name)) is not None]
            offset = (place + 0.5) * width - 0.4
            _feet(ax, [x + offset for x, _ in spots], width * 0.92, style)
            ax.bar(
                [x + offset for x, _ in spots],
                [_scaled(group, estimate.value) for _, estimate in spots],
                width * 0.92,
                color=style.color,
                hatch=style.hatch,
                edgecolor="white",
                linewidth=0,
                yerr=_errors(group, [estimate for _, estimate in spots]),
                error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
                label=group.names[row],
            )
            _crosses(ax, [x + offset for x, name in enumerate(names) if name not in found])
        _full_bars(ax, group, names)
        ax.set_xticks(range(len(names)), list(map(task_name, names)))
        ax.tick_params(axis="x", labelsize=_LETTERS, length=0)
        if per_line > 5:
            for label in ax.get_xticklabels():
                label.set(rotation=20, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.6, per_line - 0.4)
        _value_axis(ax, group)
    note = f"{group.length} tokens, budget {budget_text(budget)}; 95 % intervals"
    _finish(figure, axes, group.title, note)
    return figure


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
    width, height = max(1.7, 0.42 * len(lengths) + 0.6), max(1.5, 0.24 * len(depths) + 0.6)
    inches = max(6.0, columns * width + 1.4)
    figure, axes = _grid(len(names), columns, inches, ceil(len(names) / columns) * height + 1.0)
    for number, (ax, name) in enumerate(zip(axes, names, strict=True)):
        values = grids[name]["mean"].unstack("length").reindex(index=depths, columns=lengths)
        _heat_map(ax, 100 * values)
        ax.set_title(shorten(name, int(width * 12)), fontsize=_LETTERS)
        if number % columns == 0:
            ax.set_ylabel("depth, %", fontsize=_LETTERS)
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.9, pad=0.015, aspect=25)
    bar.set_label("needles found, %", fontsize=_LETTERS)
    bar.ax.tick_params(labelsize=_LETTERS - 1)
    title = (
        f"{groups[0].model}, {groups[0].protocol}, budget {budget_text(budget)}, "
        f"{span(fields['size'])} prompt{'' if fields['size'].max() == 1 else 's'} a field"
    )
    figure.suptitle(shorten(title, int(inches * 12)), fontsize=_LETTERS + 2)
    figure.supxlabel("tokens of the context", fontsize=_LETTERS)
    return figure


def _feet(ax: Axes, places: Sequence[float], width: float, style: Style) -> None:
    """Lines on which bars stand, where a value of 0 would show nothing."""
    left, right = ([x + side * width / 2 for x in places] for side in (-1, 1))
    ax.hlines([0.0] * len(left), left, right, color=style.color, linewidth=2)


def _crosses(ax: Axes, places: Sequence[float]) -> None:
    """Marks in the place of bars that were not measured."""
    if places:
        ax.plot(
            places,
            [0.0] * len(places),
            color="0.45",
            marker="x",
            markersize=5,
            linestyle="none",
            clip_on=False,
            label=NOT_MEASURED,
        )


def _full_bars(ax: Axes, group: ResultGroup, names: Sequence[str]) -> None:
    if group.full is None:
        return
    label: str | None = group.names[group.full]
    for task, estimate in group.task_means(group.full, "").items():
        if task in names:
            ends = [names.index(task) - 0.43, names.index(task) + 0.43]
            value = [_scaled(group, estimate.value)] * 2
            ax.plot(ends, value, color="black", linewidth=1.2, label=label)
            label = None


def _line(ax: Axes, group: ResultGroup, row: SettingRow, style: Style, jitter: float) -> None:
    points = []
    for budget in group.budgets:
        mean, share = _mean(group, row, budget), group.share(row, budget)
        if mean is not None and share is not None:
            points.append((share * jitter, mean))
    if not points:  # it has not answered all tasks
        return
    ax.errorbar(
        [x for x, _ in points],
        [_scaled(group, mean.value) for _, mean in points],
        yerr=_errors(group, [mean for _, mean in points]),
        color=style.color,
        marker=style.marker,
        markerfacecolor="white" if style.hollow else style.color,
        markersize=5,
        linestyle=style.line,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
        label=group.names[row],
    )


def _mean(group: ResultGroup, row: SettingRow, budget: str) -> Estimate | None:
    mean = group.mean(row, budget)
    if mean is None or not group.likelihood or group.full is None:
        return mean
    difference = group.difference(row, budget, group.full)
    if difference is None:
        return mean
    by = difference.estimate
    low, high = mean.value - (by.value - by.low), mean.value + (by.high - by.value)
    return Estimate(mean.value, low, high, by.n)


def _heat_map(ax: Axes, values: pd.DataFrame) -> None:
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


def _scaled(group: ResultGroup, value: float) -> float:
    return value if group.likelihood else 100 * value


def _errors(group: ResultGroup, estimates: Sequence[Estimate]) -> list[list[float]]:
    return [
        [_scaled(group, e.value - e.low) for e in estimates],
        [_scaled(group, e.high - e.value) for e in estimates],
    ]


def _share_axis(ax: Axes, group: ResultGroup) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("share of the cache that is kept", fontsize=_LETTERS)
    shares = sorted(sum(group.shares(budget)) / 2 for budget in group.budgets)
    ticks: list[float] = []
    for share in shares:  # labels that would touch are left out
        if not ticks or log(share / ticks[-1]) > 0.2:
            ticks.append(share)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([share_text(share) for share in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    if shares[-1] < 1.5 * shares[0]:  # else the marks beside one share would fill the axis
        ax.set_xlim(shares[0] / 1.5, shares[-1] * 1.5)


def _value_axis(ax: Axes, group: ResultGroup) -> None:
    ax.tick_params(labelsize=_LETTERS - 1)
    ax.grid(axis="y", color="0.88", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if group.likelihood:
        ax.set_ylabel("nats per token", fontsize=_LETTERS)
        low, high = ax.get_ylim()
        ax.set_ylim(low, max(high, low + 0.02))
        right = ax.secondary_yaxis("right")
        right.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{exp(nats):.3g}"))
        right.tick_params(labelsize=_LETTERS - 1)
        right.set_ylabel("perplexity", fontsize=_LETTERS)
    else:
        ax.set_ylabel("score, %", fontsize=_LETTERS)
        ax.set_ylim(-3, 103)


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its axes in lines of ``columns``."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings
    lines = ceil(count / columns)
    return figure, [figure.add_subplot(lines, columns, number + 1) for number in range(count)]


def _finish(figure: Figure, axes: Sequence[Axes], title: str, note: str) -> None:
    """Title, and a legend below with an entry for each name, for which the figure grows."""
    width, height = figure.get_size_inches()
    lines = f"{shorten(title, int(width * 12))}\n{shorten(note, int(width * 12))}"
    figure.suptitle(lines, fontsize=_LETTERS + 1)
    entries: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if NOT_MEASURED in entries:  # after the settings
        entries[NOT_MEASURED] = entries.pop(NOT_MEASURED)
    column = _LEGEND_LINE + _LEGEND_LETTER * max(map(len, entries), default=0)
    columns = max(1, min(len(entries), int(width / column)))
    figure.set_size_inches(width, height + 0.2 * ceil(len(entries) / columns))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        fontsize=_LETTERS - 1,
        frameon=False,
        handlelength=3,
    )

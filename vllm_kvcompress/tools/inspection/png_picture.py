"""One picture of what methods kept: heat maps, budgets, CAKE's figures and the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_kvcompress.tools.inspection import excerpts
from vllm_kvcompress.tools.inspection.kept_tokens import Floats, Inspection, Run, bin_edges, binned
from vllm_kvcompress.tools.inspection.png_file import DPI, save_png
from vllm_kvcompress.tools.inspection.style import (
    BAR,
    BAR_TITLE,
    HEAT,
    HEAT_POWER,
    HEAT_TICKS,
    HEAT_TITLE,
    MARK,
    MEAN,
    PROFILE,
    PROFILE_NAMES,
    PROFILE_NOTE,
    TEXT_TITLE,
    headline,
    one_line,
    run_title,
    shorten,
    strongest,
    window_note,
)

# All in inches.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 1.0, 1.25, 0.1
_GAP = 0.22
_BETWEEN = 0.45
_BARS = 1.5
_PROFILE = 0.75
_AXIS = 1.0
_TEXT_TITLE = 0.3

_HEAT_NORM = PowerNorm(HEAT_POWER, vmin=0, vmax=1)
_LETTERS = 9.0


@dataclass(frozen=True)
class _Plan:
    """Places of the diagrams, in inches from the left and from the top."""

    inspection: Inspection

    @property
    def heat_width(self) -> float:
        return {1: 8.0, 2: 5.2, 3: 4.2}.get(len(self.inspection.runs), 3.8)

    @property
    def rows_height(self) -> float:
        return min(8.0, max(2.6, 0.16 * self.inspection.num_layers))

    def column_width(self, run: Run) -> float:
        return self.heat_width + _GAP + _BARS + len(run.profile) * (_GAP + _PROFILE)

    @property
    def width(self) -> float:
        columns = [self.column_width(run) for run in self.inspection.runs]
        return _LEFT + sum(columns) + _BETWEEN * (len(columns) - 1) + _RIGHT

    @property
    def passages(self) -> tuple[int, int]:
        """Columns of passages, and passages of a column."""
        return (2, 3) if len(self.inspection.runs) == 1 else (len(self.inspection.runs), 4)

    @property
    def text_top(self) -> float:
        return _TOP + self.rows_height + _AXIS

    @property
    def height(self) -> float:
        return self.text_top + _TEXT_TITLE + excerpts.height(self.passages[1]) + _BOTTOM


def size(inspection: Inspection) -> tuple[int, int]:
    """Width and height of the picture in pixels."""
    plan = _Plan(inspection)
    return round(plan.width * DPI), round(plan.height * DPI)


def save_picture(inspection: Inspection, path: Path) -> None:
    """Draw the inspection and write it to ``path`` as PNG, :func:`size` pixels large.

    Raises:
        OSError: The file cannot be written.

    """
    save_png(_draw(inspection), path)


def _draw(inspection: Inspection) -> Figure:
    plan = _Plan(inspection)
    width, height = size(inspection)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings
    _write(figure, plan, _LEFT, 0.3, headline(inspection), size=13, weight="bold")
    if inspection.question:
        room = int((plan.width - _LEFT - _RIGHT) / 0.085)
        asked = shorten(f"Question: {one_line(inspection.question)}", room)
        _write(figure, plan, _LEFT, 0.58, asked, size=10, color="0.35")
    note = f"{TEXT_TITLE} ({window_note(inspection)})"
    _write(figure, plan, _LEFT, plan.text_top + 0.1, note, size=11)
    longest = max(int(run.lengths.max()) for run in inspection.runs)
    left = _LEFT
    for number, run in enumerate(inspection.runs):
        _draw_run(figure, plan, run, left, longest, first=number == 0)
        _draw_text(figure, plan, run, left)
        left += plan.column_width(run) + _BETWEEN
    _draw_scales(figure, plan)
    return figure


def _write(
    figure: Figure,
    plan: _Plan,
    left: float,
    top: float,
    text: str,
    *,
    size: float,
    weight: str = "normal",
    color: str = "black",
) -> None:
    """A line of plain text; ``top`` is its middle."""
    figure.text(
        left / plan.width,
        1 - top / plan.height,
        text,
        fontsize=size,
        weight=weight,
        color=color,
        va="center",
        parse_math=False,
    )


def _axes(
    figure: Figure, plan: _Plan, left: float, top: float, width: float, height: float
) -> Axes:
    return figure.add_axes(
        (
            left / plan.width,
            1 - (top + height) / plan.height,
            width / plan.width,
            height / plan.height,
        )
    )


def _draw_run(
    figure: Figure, plan: _Plan, run: Run, left: float, longest: int, *, first: bool
) -> None:
    _write(figure, plan, left, _TOP - 0.37, run_title(run), size=11)
    heat = _axes(figure, plan, left, _TOP, plan.heat_width, plan.rows_height)
    edges = bin_edges(run.prompt_len, int(plan.heat_width * DPI))
    rows = np.arange(run.num_layers + 1) - 0.5
    heat.pcolormesh(edges, rows, binned(run, edges), norm=_HEAT_NORM, cmap=HEAT.lower())
    _label(heat, HEAT_TITLE, "position in the prompt (tokens)")
    heat.xaxis.set_major_locator(MaxNLocator(6 if plan.heat_width < 6 else 10, integer=True))
    inspection = plan.inspection
    _layer_axis(heat, inspection, named=first)
    if first:
        heat.set_ylabel(inspection.layer_title, fontsize=_LETTERS)

    left += plan.heat_width + _GAP
    bars = _axes(figure, plan, left, _TOP, _BARS, plan.rows_height)
    bars.barh(np.arange(run.num_layers), run.lengths, height=0.8, color=BAR)
    bars.axvline(run.mean_length, color=MEAN, linestyle="--", linewidth=1.3)
    bars.set_xlim(0, longest * 1.05)
    bars.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    _label(bars, BAR_TITLE, f"tokens of a layer\n(dashed: mean, {run.mean_length:.0f})")
    _layer_axis(bars, inspection, named=False)

    left += _BARS
    for symbol, values in run.profile.items():
        left += _GAP
        axes = _axes(figure, plan, left, _TOP, _PROFILE, plan.rows_height)
        axes.barh(np.arange(run.num_layers), values, height=0.8, color=PROFILE[symbol])
        axes.set_xlim(0, 1.05)
        axes.set_xticks([0, 0.5, 1], ["0", "\u00bd", "1"])
        _label(axes, symbol, "")
        _layer_axis(axes, inspection, named=False)
        left += _PROFILE
    if run.profile:
        span = len(run.profile) * (_PROFILE + _GAP) - _GAP
        figure.text(
            (left - span / 2) / plan.width,
            1 - (_TOP + plan.rows_height + 0.27) / plan.height,
            "\n".join([PROFILE_NOTE, *(PROFILE_NAMES[symbol] for symbol in run.profile)]),
            fontsize=_LETTERS - 1,
            ha="center",
            va="top",
            linespacing=1.15,
        )


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=_LETTERS, pad=4)
    axes.set_xlabel(unit, fontsize=_LETTERS)
    axes.tick_params(labelsize=_LETTERS - 1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _layer_axis(axes: Axes, inspection: Inspection, *, named: bool) -> None:
    layers, numbers = inspection.num_layers, inspection.layer_numbers
    axes.set_ylim(layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True))
    axes.yaxis.set_major_formatter(
        lambda row, _: str(numbers[round(row)]) if 0 <= round(row) < layers else ""
    )
    axes.tick_params(axis="y", labelleft=named, length=3 if named else 0)


def _draw_text(figure: Figure, plan: _Plan, run: Run, left: float) -> None:
    """The run's best passages, in the columns that there are for it."""
    columns, rows = plan.passages
    columns //= len(plan.inspection.runs)
    width = (plan.column_width(run) - _BETWEEN * (columns - 1)) / columns
    characters = width / excerpts.CHARACTER_WIDTH
    height = excerpts.height(rows)
    chosen = excerpts.pick(plan.inspection, run, columns=int(characters), count=columns * rows)
    for column in range(columns):
        start = left + column * (width + _BETWEEN)
        axes = _axes(figure, plan, start, plan.text_top + _TEXT_TITLE, width, height)
        axes.set_xlim(0, characters)
        axes.set_ylim(height / excerpts.LINE_HEIGHT, 0)
        axes.set_axis_off()
        excerpts.draw(axes, plan.inspection, run, chosen[column * rows : (column + 1) * rows])


def _draw_scales(figure: Figure, plan: _Plan) -> None:
    height = min(plan.rows_height, 3.2)
    heat = ScalarMappable(_HEAT_NORM, colormaps[HEAT.lower()])
    _draw_scale(figure, plan, _TOP, height, heat, HEAT_TICKS)
    marks = LinearSegmentedColormap.from_list("marks", ["white", MARK])
    high = strongest(plan.inspection)
    text = ScalarMappable(Normalize(0, high), marks)
    height = excerpts.height(plan.passages[1]) - 0.3
    _draw_scale(figure, plan, plan.text_top + _TEXT_TITLE, height, text, np.linspace(0, high, 6))


def _draw_scale(
    figure: Figure,
    plan: _Plan,
    top: float,
    height: float,
    colors: ScalarMappable,
    ticks: Sequence[float] | Floats,
) -> None:
    axes = _axes(figure, plan, plan.width - _RIGHT + 0.3, top, 0.14, height)
    bar = figure.colorbar(colors, cax=axes, ticks=list(ticks))
    bar.ax.set_yticks(list(ticks), [f"{tick:.0%}" for tick in ticks])
    bar.ax.tick_params(labelsize=_LETTERS - 1)
    bar.minorticks_off()

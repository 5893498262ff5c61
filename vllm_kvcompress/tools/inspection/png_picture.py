"""One picture of what methods kept: heat maps, budgets, CAKE's figures and the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_kvcompress.tools.inspection import excerpts, style
from vllm_kvcompress.tools.inspection.kept_tokens import Floats, Inspection, Run, bin_edges, binned
from vllm_kvcompress.tools.inspection.png_file import DPI, save_png

# All in inches.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 1.0, 1.25, 0.1
_GAP = 0.22
_BETWEEN = 0.45
_BARS = 1.5
_PROFILE = 0.75
_AXIS = 1.0
_TEXT_TITLE = 0.3

_HEAT_NORM = PowerNorm(style.HEAT_POWER, vmin=0, vmax=1)
_LETTERS = 9.0


class _Sheet:
    """The empty picture of an inspection, with places in inches from the left and from the top."""

    def __init__(self, inspection: Inspection) -> None:
        runs = inspection.runs
        self.inspection = inspection
        self.heat_width = {1: 8.0, 2: 5.2, 3: 4.2}.get(len(runs), 3.8)
        self.rows_height = min(8.0, max(2.6, 0.16 * inspection.num_layers))
        # Columns of passages, and passages of a column.
        self.passages = (2, 3) if len(runs) == 1 else (len(runs), 4)
        self.text_top = _TOP + self.rows_height + _AXIS
        columns = sum(self.column_width(run) for run in runs)
        self.width = _LEFT + columns + _BETWEEN * (len(runs) - 1) + _RIGHT
        self.height = self.text_top + _TEXT_TITLE + excerpts.height(self.passages[1]) + _BOTTOM
        pixels = round(self.width * DPI), round(self.height * DPI)
        self.figure = Figure((pixels[0] / DPI, pixels[1] / DPI), DPI, facecolor="white")
        FigureCanvasAgg(self.figure)  # no window system, whatever the user's settings

    def column_width(self, run: Run) -> float:
        """Width of a run's diagrams."""
        return self.heat_width + _GAP + _BARS + len(run.profile) * (_GAP + _PROFILE)

    def write(self, left: float, top: float, text: str, size: float, **looks: Any) -> None:
        """Write plain text; ``top`` is its middle."""
        place = left / self.width, 1 - top / self.height
        looks = {"va": "center", **looks}
        self.figure.text(*place, text, fontsize=size, parse_math=False, **looks)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Make the axes of a diagram."""
        return self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )


def save_picture(inspection: Inspection, path: Path) -> None:
    """Draw the inspection and write it to ``path`` as PNG.

    Raises:
        OSError: The file cannot be written.

    """
    save_png(_draw(inspection), path)


def _draw(inspection: Inspection) -> Figure:
    sheet = _Sheet(inspection)
    sheet.write(_LEFT, 0.3, style.headline(inspection), 13, weight="bold")
    if inspection.question:
        room = int((sheet.width - _LEFT - _RIGHT) / 0.085)
        asked = style.shorten(f"Question: {style.one_line(inspection.question)}", room)
        sheet.write(_LEFT, 0.58, asked, 10, color="0.35")
    note = f"{style.TEXT_TITLE} ({style.window_note(inspection)})"
    sheet.write(_LEFT, sheet.text_top + 0.1, note, 11)
    longest = max(int(run.lengths.max()) for run in inspection.runs)
    left = _LEFT
    for number, run in enumerate(inspection.runs):
        _draw_run(sheet, run, left, longest, first=number == 0)
        _draw_text(sheet, run, left)
        left += sheet.column_width(run) + _BETWEEN
    height = min(sheet.rows_height, 3.2)
    heat = ScalarMappable(_HEAT_NORM, colormaps[style.HEAT.lower()])
    _draw_scale(sheet, _TOP, height, heat, style.HEAT_TICKS)
    marks = LinearSegmentedColormap.from_list("marks", ["white", style.MARK])
    high = style.strongest(inspection)
    height = excerpts.height(sheet.passages[1]) - 0.3
    top = sheet.text_top + _TEXT_TITLE
    text = ScalarMappable(Normalize(0, high), marks)
    _draw_scale(sheet, top, height, text, np.linspace(0, high, 6))
    return sheet.figure


def _draw_run(sheet: _Sheet, run: Run, left: float, longest: int, *, first: bool) -> None:
    inspection, layers = sheet.inspection, np.arange(run.num_layers)
    sheet.write(left, _TOP - 0.37, style.run_title(run), 11)
    heat = sheet.axes(left, _TOP, sheet.heat_width, sheet.rows_height)
    edges = bin_edges(run.prompt_len, int(sheet.heat_width * DPI))
    rows = np.arange(run.num_layers + 1) - 0.5
    heat.pcolormesh(edges, rows, binned(run, edges), norm=_HEAT_NORM, cmap=style.HEAT.lower())
    _label(heat, style.HEAT_TITLE, "position in the prompt (tokens)")
    heat.xaxis.set_major_locator(MaxNLocator(6 if sheet.heat_width < 6 else 10, integer=True))
    _layer_axis(heat, inspection, named=first)
    if first:
        heat.set_ylabel(inspection.layer_title, fontsize=_LETTERS)

    left += sheet.heat_width + _GAP
    bars = sheet.axes(left, _TOP, _BARS, sheet.rows_height)
    bars.barh(layers, run.lengths, height=0.8, color=style.BAR)
    bars.axvline(run.mean_length, color=style.MEAN, linestyle="--", linewidth=1.3)
    bars.set_xlim(0, longest * 1.05)
    bars.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    _label(bars, style.BAR_TITLE, f"tokens of a layer\n(dashed: mean, {run.mean_length:.0f})")
    _layer_axis(bars, inspection, named=False)

    left += _BARS
    for symbol, values in run.profile.items():
        left += _GAP
        axes = sheet.axes(left, _TOP, _PROFILE, sheet.rows_height)
        axes.barh(layers, values, height=0.8, color=style.PROFILE[symbol])
        axes.set_xlim(0, 1.05)
        axes.set_xticks([0, 0.5, 1], ["0", "\u00bd", "1"])
        _label(axes, symbol, "")
        _layer_axis(axes, inspection, named=False)
        left += _PROFILE
    if run.profile:
        span = len(run.profile) * (_PROFILE + _GAP) - _GAP
        names = [style.PROFILE_NAMES[symbol] for symbol in run.profile]
        words = "\n".join([style.PROFILE_NOTE, *names])
        top = _TOP + sheet.rows_height + 0.27
        place = {"ha": "center", "va": "top", "linespacing": 1.15}
        sheet.write(left - span / 2, top, words, _LETTERS - 1, **place)


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


def _draw_text(sheet: _Sheet, run: Run, left: float) -> None:
    """The run's best passages, in the columns that there are for it."""
    columns, rows = sheet.passages
    columns //= len(sheet.inspection.runs)
    width = (sheet.column_width(run) - _BETWEEN * (columns - 1)) / columns
    characters = width / excerpts.CHARACTER_WIDTH
    height = excerpts.height(rows)
    chosen = excerpts.pick(sheet.inspection, run, columns=int(characters), count=columns * rows)
    for column in range(columns):
        start = left + column * (width + _BETWEEN)
        axes = sheet.axes(start, sheet.text_top + _TEXT_TITLE, width, height)
        axes.set_xlim(0, characters)
        axes.set_ylim(height / excerpts.LINE_HEIGHT, 0)
        axes.set_axis_off()
        excerpts.draw(axes, sheet.inspection, run, chosen[column * rows : (column + 1) * rows])


def _draw_scale(
    sheet: _Sheet,
    top: float,
    height: float,
    colors: ScalarMappable,
    ticks: Sequence[float] | Floats,
) -> None:
    axes = sheet.axes(sheet.width - _RIGHT + 0.3, top, 0.14, height)
    bar = sheet.figure.colorbar(colors, cax=axes, ticks=list(ticks))
    bar.ax.set_yticks(list(ticks), [f"{tick:.0%}" for tick in ticks])
    bar.ax.tick_params(labelsize=_LETTERS - 1)
    bar.minorticks_off()

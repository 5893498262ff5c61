"""The page's diagrams as one plotly figure: axes shared by all methods, so they zoom together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib import colormaps
from plotly.subplots import make_subplots

from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Ints, Run, bin_edges, binned
from vllm_kvcompress.tools.inspection.style import (
    BAR,
    BAR_TITLE,
    HEAT,
    HEAT_POWER,
    HEAT_TICKS,
    HEAT_TITLE,
    MEAN,
    PROFILE,
    PROFILE_NAMES,
    PROFILE_NOTE,
    run_title,
)

COLUMNS, MOST_COLUMNS = 1200, 600
"""Bins of all heat maps together, and most of one."""

_HEAT_WIDTH, _BAR_WIDTH, _PROFILE_WIDTH = 6.0, 1.5, 0.8


@dataclass(frozen=True)
class _Column:
    """A diagram's place: its subplot, the run it belongs to, and what it shows."""

    number: int
    run: Run
    kind: str

    @property
    def width(self) -> float:
        return {"heat": _HEAT_WIDTH, "bars": _BAR_WIDTH}.get(self.kind, _PROFILE_WIDTH)


def edges_of(inspection: Inspection) -> Ints:
    """Borders of the heat maps' bins, the same for all methods."""
    columns = min(MOST_COLUMNS, COLUMNS // len(inspection.runs))
    return bin_edges(inspection.prompt_len, max(1, columns))


def min_width(inspection: Inspection) -> int:
    """Pixels below which labels of the chart would run into each other."""
    return 120 + round(51 * sum(column.width for column in _columns(inspection)))


def chart(inspection: Inspection) -> go.Figure:
    """Heat map, budgets and CAKE's figures of every run, side by side.

    Traces of kind heatmap lack the words of their bins, which are the same in every row; the
    page's script puts them in (``customdata``) from the columns it is given.
    """
    columns = _columns(inspection)
    widths = [column.width for column in columns]
    figure = make_subplots(
        rows=1,
        cols=len(columns),
        shared_yaxes="all",
        column_widths=[width / sum(widths) for width in widths],
        horizontal_spacing=min(0.012, 0.5 / len(columns)),
        column_titles=[_title(column) for column in columns],
    )
    figure.update_annotations(font_size=12)  # the columns' titles
    for column in columns:
        _draw(figure, column, inspection)
    _set_axes(figure, inspection, columns)
    return figure


def _columns(inspection: Inspection) -> list[_Column]:
    kinds = [(run, kind) for run in inspection.runs for kind in ("heat", "bars", *run.profile)]
    return [_Column(number, run, kind) for number, (run, kind) in enumerate(kinds, start=1)]


def _title(column: _Column) -> str:
    return {"heat": HEAT_TITLE, "bars": BAR_TITLE}.get(column.kind, column.kind)


def _draw(figure: go.Figure, column: _Column, inspection: Inspection) -> None:
    run, edges = column.run, edges_of(inspection)
    # Numbers with gaps are names of categories, so that rows stay side by side.
    numbers = inspection.layer_numbers
    layers = [str(number) for number in numbers] if inspection.layers else np.arange(len(numbers))
    if column.kind == "heat":
        trace = go.Heatmap(
            x=edges,
            y=layers,
            z=binned(run, edges).astype(np.float32),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}<br>positions %{customdata[0]}<br>%{z:.0%} of KV heads"
            "<br>%{customdata[1]}<extra>" + run.method + "</extra>",
        )
    elif column.kind == "bars":
        trace = go.Bar(
            x=run.lengths,
            y=layers,
            orientation="h",
            marker_color=BAR,
            customdata=[_bar_words(run, layer) for layer in range(run.num_layers)],
            hovertemplate="layer %{y}: %{x} tokens<br>%{customdata}<extra>"
            + run.method
            + "</extra>",
        )
    else:
        trace = go.Bar(
            x=run.profile[column.kind],
            y=layers,
            orientation="h",
            marker_color=PROFILE[column.kind],
            hovertemplate="layer %{y}: %{x:.3g} " + PROFILE_NOTE + "<br>"
            f"{PROFILE_NAMES[column.kind]}<extra>{run.method}</extra>",
        )
    figure.add_trace(trace, row=1, col=column.number)
    if column.kind == "bars":
        figure.add_vline(
            x=run.mean_length, line_dash="dash", line_color=MEAN, col=column.number, row=1
        )


def _bar_words(run: Run, layer: int) -> str:
    """Further facts on a layer beside its budget."""
    length = int(run.lengths[layer])
    share, times = length / run.prompt_len, length / run.mean_length
    words = [f"{share:.1%} of the prompt, {times:.2f} \u00d7 the mean"]
    if run.weights is not None:
        words.append(f"weight {run.weights[layer]:.3g}")
    stats = run.stats[layer] if run.stats else {}
    words += [f"{name} {value:.4g}" for name, value in stats.items()]
    return "<br>".join(words)


def _set_axes(figure: go.Figure, inspection: Inspection, columns: list[_Column]) -> None:
    layers = inspection.num_layers
    longest = max(int(run.lengths.max()) for run in inspection.runs)
    figure.update_yaxes(range=[layers - 0.5, -0.5], zeroline=False, showgrid=False)
    figure.update_yaxes(title_text=inspection.layer_title, col=1)
    if inspection.layers:
        figure.update_yaxes(type="category")
    heats = [column.number for column in columns if column.kind == "heat"]
    for column in columns:
        if column.kind == "heat":
            axis: dict[str, Any] = {
                "title_text": "position in the prompt (tokens)",
                "range": [0, inspection.prompt_len],
                "matches": None if column.number == heats[0] else "x",
            }
            name, kept = run_title(column.run).split(": ", 1)
            figure.add_annotation(
                text=f"<b>{name}</b><br>{kept}",
                x=0,
                xref="x domain" if column.number == 1 else f"x{column.number} domain",
                y=1,
                yref="paper",
                yshift=26,
                xanchor="left",
                yanchor="bottom",
                align="left",
                showarrow=False,
                font_size=13,
            )
        elif column.kind == "bars":
            mean = f"(dashed: mean, {column.run.mean_length:.0f})"
            axis = {"title_text": f"tokens of a layer<br>{mean}", "range": [0, longest * 1.05]}
        else:
            axis = {"range": [0, 1.05], "tickvals": [0, 1]}
            if column.kind == "V":
                axis["title_text"] = PROFILE_NOTE.replace("to the", "to<br>the")
        axis |= {"nticks": 6 if column.kind == "heat" else 3, "title_font_size": 12, "tickangle": 0}
        figure.update_xaxes(**axis, col=column.number)
    figure.update_layout(
        height=min(1100, max(300, 13 * layers)) + 180,
        margin={"l": 60, "r": 20, "t": 100, "b": 80},
        font_color="#222",
        showlegend=False,
        bargap=0.2,
        plot_bgcolor="white",
        hoverlabel_align="left",
        coloraxis={
            "cmin": 0,
            "cmax": 1,
            "colorscale": _heat_scale(),
            "colorbar": {"tickvals": HEAT_TICKS, "tickformat": ".0%", "thickness": 14},
        },
    )


def _heat_scale() -> list[tuple[float, str]]:
    """The picture's colours: of the share's root, so a stop lies at its colour's power."""
    steps = np.linspace(0.0, 1.0, 65)
    colors = (colormaps[HEAT.lower()](steps)[:, :3] * 255).round().astype(int)
    return [
        (float(step ** (1 / HEAT_POWER)), f"rgb({r},{g},{b})")
        for step, (r, g, b) in zip(steps, colors.tolist(), strict=True)
    ]

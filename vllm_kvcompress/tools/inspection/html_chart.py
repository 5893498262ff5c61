"""The page's diagrams as one plotly figure: axes shared by all methods, so they zoom together."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from matplotlib import colormaps
from plotly.subplots import make_subplots

from vllm_kvcompress.tools.inspection import style
from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Ints, Run, bin_edges, binned

COLUMNS, MOST_COLUMNS = 1200, 600
"""Bins of all heat maps together, and most of one."""

_HEAT_WIDTH, _BARS_WIDTH, _PROFILE_WIDTH = 6.0, 1.5, 0.8


def edges_of(inspection: Inspection) -> Ints:
    """Borders of the heat maps' bins, the same for all methods."""
    columns = min(MOST_COLUMNS, COLUMNS // len(inspection.runs))
    return bin_edges(inspection.prompt_len, max(1, columns))


def min_width(inspection: Inspection) -> int:
    """Pixels below which labels of the chart would run into each other."""
    return 120 + round(51 * sum(width for _, width in _columns(inspection)))


def chart(inspection: Inspection) -> go.Figure:
    """Heat map, budgets and CAKE's figures of every run, side by side.

    Traces of kind heatmap lack the words of their bins, which are the same in every row; the
    page's script puts them in (``customdata``) from the columns it is given.
    """
    titles, widths = zip(*_columns(inspection), strict=True)
    figure = make_subplots(
        rows=1,
        cols=len(widths),
        shared_yaxes="all",
        column_widths=[width / sum(widths) for width in widths],
        horizontal_spacing=min(0.012, 0.5 / len(widths)),
        column_titles=titles,
    )
    figure.update_annotations(font_size=12)  # the columns' titles
    layers = inspection.num_layers
    figure.update_yaxes(range=[layers - 0.5, -0.5], zeroline=False, showgrid=False)
    figure.update_yaxes(title_text=inspection.layer_title, col=1)
    if inspection.layers:
        figure.update_yaxes(type="category")
    figure.update_xaxes(title_font_size=12, tickangle=0, nticks=3)
    column = 1
    for run in inspection.runs:
        _draw_heat(figure, inspection, run, column)
        _draw_bars(figure, inspection, run, column + 1)
        for number, symbol in enumerate(run.profile, start=column + 2):
            _draw_profile(figure, inspection, run, symbol, number)
        column += 2 + len(run.profile)
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
            "colorbar": {"tickvals": style.HEAT_TICKS, "tickformat": ".0%", "thickness": 14},
        },
    )
    return figure


def _columns(inspection: Inspection) -> list[tuple[str, float]]:
    """Title and relative width of every diagram."""
    return [
        column
        for run in inspection.runs
        for column in (
            (style.HEAT_TITLE, _HEAT_WIDTH),
            (style.BAR_TITLE, _BARS_WIDTH),
            *((symbol, _PROFILE_WIDTH) for symbol in run.profile),
        )
    ]


def _layers(inspection: Inspection) -> list[str] | Ints:
    # Numbers with gaps are names of categories, so that rows stay side by side.
    numbers = inspection.layer_numbers
    return [str(number) for number in numbers] if inspection.layers else np.arange(len(numbers))


def _draw_heat(figure: go.Figure, inspection: Inspection, run: Run, column: int) -> None:
    edges = edges_of(inspection)
    trace = go.Heatmap(
        x=edges,
        y=_layers(inspection),
        z=binned(run, edges).astype(np.float32),
        coloraxis="coloraxis",
        hovertemplate="layer %{y}<br>positions %{customdata[0]}<br>%{z:.0%} of KV heads"
        f"<br>%{{customdata[1]}}<extra>{run.method}</extra>",
    )
    figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(
        title_text="position in the prompt (tokens)",
        range=[0, inspection.prompt_len],
        matches=None if column == 1 else "x",
        nticks=6,
        col=column,
    )
    name, kept = style.run_title(run).split(": ", 1)
    figure.add_annotation(
        text=f"<b>{name}</b><br>{kept}",
        x=0,
        xref="x domain" if column == 1 else f"x{column} domain",
        y=1,
        yref="paper",
        yshift=26,
        xanchor="left",
        yanchor="bottom",
        align="left",
        showarrow=False,
        font_size=13,
    )


def _draw_bars(figure: go.Figure, inspection: Inspection, run: Run, column: int) -> None:
    trace = go.Bar(
        x=run.lengths,
        y=_layers(inspection),
        orientation="h",
        marker_color=style.BAR,
        customdata=[_bar_words(run, layer) for layer in range(run.num_layers)],
        hovertemplate=f"layer %{{y}}: %{{x}} tokens<br>%{{customdata}}<extra>{run.method}</extra>",
    )
    figure.add_trace(trace, row=1, col=column)
    figure.add_vline(x=run.mean_length, line_dash="dash", line_color=style.MEAN, col=column, row=1)
    longest = max(int(run.lengths.max()) for run in inspection.runs)
    title = f"tokens of a layer<br>(dashed: mean, {run.mean_length:.0f})"
    figure.update_xaxes(title_text=title, range=[0, longest * 1.05], col=column)


def _draw_profile(
    figure: go.Figure, inspection: Inspection, run: Run, symbol: str, column: int
) -> None:
    trace = go.Bar(
        x=run.profile[symbol],
        y=_layers(inspection),
        orientation="h",
        marker_color=style.PROFILE[symbol],
        hovertemplate=f"layer %{{y}}: %{{x:.3g}} {style.PROFILE_NOTE}<br>"
        f"{style.PROFILE_NAMES[symbol]}<extra>{run.method}</extra>",
    )
    figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(range=[0, 1.05], tickvals=[0, 1], col=column)
    if symbol == "V":
        note = style.PROFILE_NOTE.replace("to the", "to<br>the")
        figure.update_xaxes(title_text=note, col=column)


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


def _heat_scale() -> list[tuple[float, str]]:
    """The picture's colours: of the share's root, so a stop lies at its colour's power."""
    steps = np.linspace(0.0, 1.0, 65)
    colors = (colormaps[style.HEAT.lower()](steps)[:, :3] * 255).round().astype(int)
    return [
        (float(step ** (1 / style.HEAT_POWER)), f"rgb({r},{g},{b})")
        for step, (r, g, b) in zip(steps, colors.tolist(), strict=True)
    ]

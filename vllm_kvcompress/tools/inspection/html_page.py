"""One HTML file to explore what methods kept; it needs no network and allows itself none."""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from vllm_kvcompress.tools.inspection import style
from vllm_kvcompress.tools.inspection.html_chart import chart, edges_of, min_width
from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Run

LEVELS = 10
"""Strengths of the marks in the text."""

_SNIPPET = 70


def save_page(inspection: Inspection, path: Path) -> None:
    """Write the page to ``path``.

    Raises:
        OSError: The file cannot be written.

    """
    path.write_text(render(inspection), encoding="utf-8")


def render(inspection: Inspection) -> str:
    """The page's HTML."""
    template = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    red, green, blue = (int(style.MARK[i : i + 2], 16) for i in (1, 3, 5))
    return environment.from_string(template).render(
        title=style.headline(inspection),
        question=inspection.question,
        tokens=list(zip(inspection.pieces, levels(inspection, inspection.runs[0]), strict=True)),
        runs=[style.run_title(run) for run in inspection.runs],
        profile=[
            name
            for symbol, name in style.PROFILE_NAMES.items()
            if any(symbol in run.profile for run in inspection.runs)
        ],
        profile_note=style.PROFILE_NOTE,
        levels=LEVELS,
        strongest=style.strongest(inspection),
        mark=f"{red},{green},{blue}",
        data=page_data(inspection),
        min_width=min_width(inspection),
        figure=json.loads(chart(inspection).to_json()),
        plotly=get_plotlyjs(),
    )


def levels(inspection: Inspection, run: Run) -> list[int]:
    """Strength of every token's mark, 0 to :data:`LEVELS`."""
    scaled = np.ceil(run.token_share / style.strongest(inspection) * LEVELS)
    return [int(level) for level in np.minimum(scaled, LEVELS)]


def page_data(inspection: Inspection) -> dict[str, Any]:
    """Data for the page's script.

    ``numbers``: of every layer its number in the model.
    ``columns``: of every bin of the heat maps its positions and text. ``runs``: of every method its
    title, its KV heads, the marks' strengths as digits of base 36, and ``counts``: the heads that
    keep each token in each layer, uint16 [L, S] little endian, zlib, base64.
    """
    edges = edges_of(inspection).tolist()
    return {
        "layers": inspection.num_layers,
        "numbers": inspection.layer_numbers,
        "columns": [_column(inspection, a, b) for a, b in pairwise(edges)],
        "runs": [
            {
                "title": style.run_title(run),
                "heads": run.num_heads,
                "levels": "".join(np.base_repr(n, 36) for n in levels(inspection, run)),
                "counts": _packed(run),
            }
            for run in inspection.runs
        ],
    }


def _column(inspection: Inspection, start: int, stop: int) -> tuple[str, str]:
    span = str(start) if stop - start == 1 else f"{start} to {stop - 1}"
    # Plotly takes its hover texts for HTML of a kind, without all of its entities.
    text = style.one_line("".join(inspection.pieces[start:stop]))
    return span, html.escape(style.shorten(text, _SNIPPET), quote=False)


def _packed(run: Run) -> str:
    raw = zlib.compress(run.counts.astype("<u2").tobytes(), 9)
    return base64.b64encode(raw).decode("ascii")

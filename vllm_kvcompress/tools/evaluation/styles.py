"""Colours, marks and lines of settings, the same in every picture of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, SettingRow
from vllm_kvcompress.tools.inspection.style import BAR, MARK, MEAN, PROFILE

COLORS = (
    *(BAR, MEAN, PROFILE["V"], PROFILE["P"], MARK, PROFILE["H"]),
    *("#7F7F7F", "#8C510A", "#332288", "#882255"),
)
"""Okabe and Ito's colours without yellow, too faint on white; then grey, brown, indigo, wine."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))

HATCHES = ("", "xx", "..", "++")
OTHERS_HATCH = "////"


@dataclass(frozen=True)
class Style:
    """How a setting is drawn.

    Attributes:
        color: Colour of line and mark.
        marker: Mark, as matplotlib names it.
        line: Line style, as matplotlib takes it.
        hollow: Whether the mark is not filled, as for another package's implementation.
        hatch: Hatch of bars, as matplotlib names it; None for plain bars.

    """

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]
    hollow: bool
    hatch: str | None


def styles_for(groups: Iterable[ResultGroup]) -> dict[SettingRow, Style]:
    """Choose a style for every compressed row; settings of one label share colour and marker.

    Labels that are the same up to a comma, "cake" and "cake, faithful", share the colour. Colours
    repeat after ten such labels, with markers that no label before had with them, as long as there
    are markers.
    """
    rows = list(dict.fromkeys(row for group in groups for row in group.rows if not row.full))
    families: dict[str, list[str]] = {}
    for label in dict.fromkeys(row.label for row in rows):
        families.setdefault(_family(label), []).append(label)
    longest = max(map(len, families.values()), default=0)
    styles = {}
    for row in rows:
        family = _family(row.label)
        again, place = divmod(list(families).index(family), len(COLORS))
        turn = again * longest + families[family].index(row.label)
        hatch = HATCHES[turn % len(HATCHES)] + ("" if row.ours else OTHERS_HATCH)
        styles[row] = Style(
            COLORS[place],
            MARKERS[(place + turn) % len(MARKERS)],
            LINES[turn % 2] if row.ours else LINES[2],
            not row.ours,
            hatch or None,
        )
    return styles


def _family(label: str) -> str:
    return label.partition(",")[0]

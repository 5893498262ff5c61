"""A Markdown page with pictures beside it, and what the pages on quality have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.heatmap import needle_figure
from vllm_kvcompress.tools.evaluation.panels import Panel
from vllm_kvcompress.tools.evaluation.plots import Looks, save, share_figure, task_figure

RULER = "ruler"

NOTES = (
    tables.BUDGET_NOTE,
    tables.INTERVAL_NOTE,
    tables.BOLD_NOTE,
    tables.FULL_NOTE,
)
"""What a reader of the tables has to know."""


@dataclass
class Document:
    """A page that is being written.

    Attributes:
        folder: Where the page's links find its pictures, relative to the page; empty: beside it.
        parts: Paragraphs, tables and headings.
        pictures: By file name, drawn only when they are written.

    """

    folder: str = ""
    parts: list[str] = field(default_factory=list)
    pictures: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    def add(self, *parts: str) -> None:
        """Append paragraphs."""
        self.parts.extend(parts)

    def heading(self, level: int, text: str) -> None:
        """Append a heading."""
        self.add(f"{'#' * level} {text}")

    def folded(self, summary: str, *parts: str) -> None:
        """Append paragraphs that a reader has to open."""
        self.add(f"<details><summary>{summary}</summary>", *parts, "</details>")

    def picture(self, name: str, what: str, draw: Callable[[], Figure]) -> None:
        """Append a picture.

        Args:
            name: From which the file's name is made; another one for every picture.
            what: Said where it cannot be seen.
            draw: Called when pictures are written.

        Raises:
            ValueError: The name is taken.

        """
        file = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".png"
        if file in self.pictures:
            raise ValueError(f"there are two pictures {file}")
        self.pictures[file] = draw
        path = f"{self.folder}/{file}" if self.folder else file
        self.add(f"![{what}]({path})")

    def text(self) -> str:
        """The page."""
        return "\n\n".join(self.parts) + "\n"

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures to ``folder`` and return their paths."""
        paths = []
        for name, draw in self.pictures.items():
            save(draw(), folder / name)
            paths.append(folder / name)
        return paths


def is_needles(panel: Panel) -> bool:
    """Whether prompts say how deep the needle lies and are no part of RULER."""
    depths = (depth for cell in panel.cells for depth in cell.depths)
    return panel.family != RULER and any(depth is not None for depth in depths)


def title(panels: Sequence[Panel]) -> str:
    """Model, tasks and protocol of panels that differ only by their length."""
    first = panels[0]
    return f"{first.model}, {first.dtype}: {first.family}, {first.protocol}"


def add_panels(
    document: Document, panels: Sequence[Panel], looks: Looks, level: int, *, against_full: bool
) -> None:
    """The picture, and of every length its header and its tables over all tasks.

    Args:
        document: Appended to.
        panels: That differ only by their length.
        looks: Of all settings of the document.
        level: Of the heading; lengths have the next one.
        against_full: Whether differences to the full cache are shown.

    """
    document.heading(level, title(panels))
    drawn = [panel for panel in panels if panel.budgets]
    if drawn:
        what = "nats per token" if drawn[0].likelihood else "score"
        document.picture(
            f"{_name(panels[0])}-shares",
            f"{what} against the share of the cache that is kept, {title(panels)}",
            partial(share_figure, drawn, looks),
        )
    for panel in panels:
        document.heading(level + 1, f"{panel.length} tokens")
        document.add(tables.header(panel), tables.means(panel))
        if panel.shared is not None:
            names = ", ".join(map(tables.task_name, panel.shared.tasks))
            document.add(
                f"Of the tasks that all settings have ({names}):", tables.means(panel.shared)
            )
        if against_full and panel.full is not None and panel.budgets:
            document.add(
                "Difference to the full cache on the same prompts:",
                tables.differences(panel, panel.full),
            )


def add_tasks(
    document: Document, panel: Panel, looks: Looks, budgets: Sequence[str], shown: str
) -> None:
    """Every task by itself: one budget as picture and table, the others' tables folded.

    Args:
        document: Appended to.
        panel: Of several tasks.
        looks: Of all settings of the document.
        budgets: The panel's, or some of them.
        shown: The one that is not folded.

    """
    name = f"{_name(panel)}-{panel.length}-tasks-{shown}"
    what = f"score per task, {title([panel])}, {panel.length} tokens"
    document.picture(name, what, partial(task_figure, panel, shown, looks))
    document.add(tables.tasks(panel, shown))
    for budget in budgets:
        if budget != shown:
            document.folded(tables.budget_text(budget), tables.tasks(panel, budget))


def add_needles(document: Document, panels: Sequence[Panel]) -> None:
    """A heat map for every budget of panels that differ only by their length."""
    for budget in dict.fromkeys(budget for panel in panels for budget in panel.budgets):
        shown = [panel for panel in panels if budget in panel.budgets]
        document.picture(
            f"{_name(panels[0])}-grid-{budget}",
            f"needles found by depth and length, {title(panels)}, {tables.budget_text(budget)}",
            partial(needle_figure, shown, budget),
        )


def nearest(panel: Panel, share: float) -> str:
    """The panel's budget that keeps nearest to a share.

    Raises:
        ValueError: The panel has only full caches.

    """
    return min(panel.budgets, key=lambda budget: abs(sum(panel.shares(budget)) / 2 - share))


def _name(panel: Panel) -> str:
    kind = "-nll" if panel.likelihood else ""
    return f"{panel.model}-{panel.dtype}-{panel.family}{kind}-{panel.protocol}"

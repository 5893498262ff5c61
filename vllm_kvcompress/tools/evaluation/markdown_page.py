"""A Markdown page with its pictures, what all pages on quality share, and the page of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.packed_results import pack
from vllm_kvcompress.tools.evaluation.plots import Styles, needle_figure, share_figure, task_figure
from vllm_kvcompress.tools.evaluation.record import RECORDS, read
from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, by_length, make_groups
from vllm_kvcompress.tools.evaluation.results_frame import make_frame
from vllm_kvcompress.tools.evaluation.styles import styles_for
from vllm_kvcompress.tools.evaluation.task import EvaluationError
from vllm_kvcompress.tools.inspection.png_file import save_png

RULER = "ruler"

SHOWN = 0.125
"""Share of the cache whose tables per task are not folded, or the nearest one that was run."""


@dataclass
class MarkdownPage:
    """A page that is being written.

    Attributes:
        parts: Paragraphs, tables and headings.
        pictures: Functions that draw the pictures, by file name; called when these are written.

    """

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
            name: Text from which the file's name is made; different for every picture.
            what: Description for readers who cannot see it.
            draw: Function that draws it, called when pictures are written.

        Raises:
            ValueError: The name is taken.

        """
        file = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".png"
        if file in self.pictures:
            raise ValueError(f"there are two pictures {file}")
        self.pictures[file] = draw
        self.add(f"![{what}]({file})")

    def text(self) -> str:
        """The page."""
        return "\n\n".join(self.parts) + "\n"

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures to ``folder`` and return their paths."""
        paths = []
        for name, draw in self.pictures.items():
            save_png(draw(), folder / name)
            paths.append(folder / name)
        return paths


def write_results(folder: Path, *, command: str, versions: Mapping[str, str]) -> list[Path]:
    """Write tables and pictures, and the packed records from which they can be made again.

    Args:
        folder: Folder of ``results.jsonl``, to which ``results.md``, ``cells.csv`` and the
            pictures are written.
        command: Command line that made the records.
        versions: Versions of the packages that took part, by name.

    Returns:
        Paths of the files written, the page first.

    Raises:
        EvaluationError: There are no records, or they do not fit together.
        OSError: A file cannot be written.

    """
    records = list(read(folder / RECORDS))
    if not records:
        raise EvaluationError(f"{folder / RECORDS} has no results to be written")
    groups = make_groups(make_frame(records))
    styles = styles_for(groups)
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    page = MarkdownPage()
    page.heading(1, "Results")
    page.add(f"```sh\n{command}\n```", f"Versions: {used}.", tables.NOTES)
    for series in by_length(groups):
        add_groups(page, series, styles, against_full=True)
        for group in series:
            if len(group.tasks) > 1 and group.budgets and not is_needles(group):
                page.heading(3, f"{group.length} tokens, per task")
                add_tasks(page, group, styles)
    text, cells = folder / "results.md", folder / "cells.csv"
    text.write_text(page.text(), encoding="utf-8")
    pack(records, cells, {"command": command, "versions": used})
    return [text, cells, *page.draw(folder)]


def is_needles(group: ResultGroup) -> bool:
    """Whether prompts say how deep the needle lies and are no part of RULER."""
    return group.family != RULER and bool(group.frame["depth"].notna().any())


def add_groups(
    page: MarkdownPage, groups: Sequence[ResultGroup], styles: Styles, *, against_full: bool
) -> None:
    """Append a picture, for every length a header and the tables over all tasks, and heat maps.

    Args:
        page: Page to append to.
        groups: Groups that differ only by their length.
        styles: Styles of all settings of the page.
        against_full: Whether differences to the full cache are shown.

    """
    page.heading(2, groups[0].title)
    drawn = [group for group in groups if group.budgets]
    if drawn:
        what = "nats per token" if drawn[0].likelihood else "score"
        page.picture(
            f"{_name(groups[0])}-shares",
            f"{what} against the share of the cache that is kept, {groups[0].title}",
            partial(share_figure, drawn, styles),
        )
    for group in groups:
        page.heading(3, f"{group.length} tokens")
        page.add(tables.header(group), tables.means(group))
        if group.shared is not None:
            names = ", ".join(map(tables.task_name, group.shared.tasks))
            page.add(f"Of the tasks that all settings have ({names}):", tables.means(group.shared))
        if against_full and group.full is not None and group.budgets:
            page.add(
                "Difference to the full cache on the same prompts:",
                tables.differences(group, group.full),
            )
    if not any(map(is_needles, groups)):
        return
    for budget in dict.fromkeys(budget for group in groups for budget in group.budgets):
        shown = [group for group in groups if budget in group.budgets]
        what = f"{groups[0].title}, {tables.budget_text(budget)}"
        page.picture(
            f"{_name(groups[0])}-grid-{budget}",
            f"needles found by depth and length, {what}",
            partial(needle_figure, shown, budget),
        )


def add_tasks(page: MarkdownPage, group: ResultGroup, styles: Styles) -> None:
    """Append every task by itself: one budget as picture and table, the others' tables folded.

    Args:
        page: Page to append to.
        group: Results of several tasks.
        styles: Styles of all settings of the page.

    """
    shown = min(group.budgets, key=lambda budget: abs(sum(group.shares(budget)) / 2 - SHOWN))
    name = f"{_name(group)}-{group.length}-tasks-{shown}"
    what = f"score per task, {group.title}, {group.length} tokens"
    page.picture(name, what, partial(task_figure, group, shown, styles))
    page.add(tables.tasks(group, shown))
    for budget in group.budgets:
        if budget != shown:
            page.folded(tables.budget_text(budget), tables.tasks(group, budget))


def _name(group: ResultGroup) -> str:
    kind = "-nll" if group.likelihood else ""
    return f"{group.model}-{group.dtype}-{group.family}{kind}-{group.protocol}"

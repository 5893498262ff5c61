"""The rows in files, as they come, and on the terminal."""

import csv
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from vllm_kvcompress.tools.bench.rows import COLUMNS, HEADINGS, BenchRow

PIPED_WIDTH = 160
"""Columns where the output is no terminal."""

LEGEND = (
    "Medians over rounds in which the engines took turns. The ratio says how many times as fast "
    "compression was: the median of the rounds' ratios, with the smallest and the largest; above "
    "1 it pays. The byte bound is what it would be if only the bytes read counted. Plain at budget "
    "is plain vLLM with prompts as long as what is kept, which no eviction can beat, and how many "
    "times as fast compression was beside it. Blocks are the most that requests held, plain and "
    "compressed; at one time, the most requests that were generating. Decode throughput leaves out "
    "the steps that read a prompt."
)


class BenchReport:
    """A table whose files are complete after each row.

    The first row writes PREFIX.csv and PREFIX.md; existing files are replaced.

    Args:
        prefix: What the files' names begin with.
        facts: What is the same for all rows: columns of the CSV, lines above the Markdown table.

    """

    def __init__(self, prefix: Path, facts: Mapping[str, str]) -> None:
        self.rows: list[BenchRow] = []
        self._facts = dict(facts)
        self.csv = prefix.with_name(prefix.name + ".csv")
        self.markdown = prefix.with_name(prefix.name + ".md")

    def add(self, row: BenchRow) -> None:
        """Write a row. Mutates both files.

        Raises:
            OSError: One of them cannot be written.

        """
        self.rows.append(row)
        # Written as a whole each time: a run that ends between two rows leaves complete files.
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *self._facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row.record(), **self._facts} for row in self.rows)
        self.markdown.write_text(as_markdown(self.rows, self._facts), encoding="utf-8")

    def show(self, file: TextIO) -> None:
        """Print the table and the notes."""
        console = Console(
            file=file, width=None if file.isatty() else PIPED_WIDTH, highlight=False, markup=False
        )
        table = Table()
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if 0 < index < 8 else "left")
        for row in self.rows:
            table.add_row(*row.cells(), style=None if row.paired.pays else "yellow")
        console.print(table)
        for note in _notes(self.rows):
            console.print(f"* {note}", soft_wrap=True)


def as_markdown(rows: list[BenchRow], facts: Mapping[str, str]) -> str:
    """Return the table, and above it where it was measured."""
    lines = ["# Compressed against plain vLLM", ""]
    for name, value in facts.items():
        if value:
            lines.append(f"* {name}: `{value}`" if name == "command" else f"* {name}: {value}")
    lines += ["", *textwrap.wrap(LEGEND, 100), ""]
    lines += [_line(HEADINGS), _line(["---", *["---:"] * 7, "---"])]
    for row in rows:
        *cells, verdict = row.cells()
        marked = verdict if row.paired.pays else f"**{verdict}**"
        lines.append(_line([*cells, marked]))
    notes = _notes(rows)
    if notes:
        lines += ["", *(f"* {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _notes(rows: list[BenchRow]) -> list[str]:
    """Return each note once, after the titles of all rows that it belongs to."""
    titles: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            titles.setdefault(note, []).append(row.title)
    return [f"{'; '.join(names)}: {note}" for note, names in titles.items()]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"

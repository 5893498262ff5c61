"""The page that a run of ``kvcompress eval`` leaves beside its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_kvcompress.tools.evaluation.cells import make_cells
from vllm_kvcompress.tools.evaluation.document import (
    NOTES,
    Document,
    add_needles,
    add_panels,
    add_tasks,
    is_needles,
    nearest,
)
from vllm_kvcompress.tools.evaluation.looks import looks_of
from vllm_kvcompress.tools.evaluation.packed import pack
from vllm_kvcompress.tools.evaluation.panels import by_length, make_panels
from vllm_kvcompress.tools.evaluation.record import Record, read
from vllm_kvcompress.tools.evaluation.task import EvaluationError

RECORDS = "results.jsonl"
PAGE = "results.md"
CELLS = "cells.csv"

SHOWN = 0.125
"""The share whose tables per task are not folded, or the nearest that was run."""


def write_results(
    records: Path | Sequence[Record], out: Path, *, command: str, versions: Mapping[str, str]
) -> list[Path]:
    """Write tables and pictures, and the packed records from which they can be made again.

    Args:
        records: Or the folder where ``results.jsonl`` lies.
        out: Folder for ``results.md``, ``cells.csv`` and pictures; made if it is not there.
        command: The command line that made the records.
        versions: Of what took part, by name.

    Returns:
        What was written, the page first.

    Raises:
        EvaluationError: There are no records, or they do not fit together.
        OSError: A file cannot be written.

    """
    where = records / RECORDS if isinstance(records, Path) else "the list of records"
    found = list(read(records / RECORDS)) if isinstance(records, Path) else list(records)
    if not found:
        raise EvaluationError(f"{where} has no results to be written")
    document = results_page(found, command=command, versions=versions)
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(document.text(), encoding="utf-8")
    pack(found, out / CELLS, {"command": command, "versions": _versions(versions)})
    return [out / PAGE, out / CELLS, *document.draw(out)]


def results_page(
    records: Sequence[Record], *, command: str, versions: Mapping[str, str]
) -> Document:
    """The page of :func:`write_results`, not yet written."""
    panels = make_panels(make_cells(records))
    looks = looks_of(panels)
    document = Document()
    document.heading(1, "Results")
    document.add(f"```sh\n{command}\n```")
    if versions:
        document.add(f"Versions: {_versions(versions)}.")
    document.add("\n".join(f"* {note}" for note in NOTES))
    for group in by_length(panels):
        add_panels(document, group, looks, 2, against_full=True)
        if any(map(is_needles, group)):
            add_needles(document, group)
        for panel in group:
            if len(panel.tasks) > 1 and panel.budgets and not is_needles(panel):
                document.heading(3, f"{panel.length} tokens, per task")
                add_tasks(document, panel, looks, panel.budgets, nearest(panel, SHOWN))
    return document


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())

"""The page that a run of ``kvcompress eval`` leaves beside its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_kvcompress.tools.evaluation.markdown_page import (
    MarkdownPage,
    add_groups,
    add_needles,
    add_tasks,
    is_needles,
)
from vllm_kvcompress.tools.evaluation.packed_results import pack
from vllm_kvcompress.tools.evaluation.record import RECORDS, read
from vllm_kvcompress.tools.evaluation.result_groups import by_length, make_groups
from vllm_kvcompress.tools.evaluation.results_frame import make_frame
from vllm_kvcompress.tools.evaluation.styles import styles_for
from vllm_kvcompress.tools.evaluation.tables import NOTES
from vllm_kvcompress.tools.evaluation.task import EvaluationError


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
    page.add(f"```sh\n{command}\n```", f"Versions: {used}.", NOTES)
    for series in by_length(groups):
        add_groups(page, series, styles, 2, against_full=True)
        if any(map(is_needles, series)):
            add_needles(page, series)
        for group in series:
            if len(group.tasks) > 1 and group.budgets and not is_needles(group):
                page.heading(3, f"{group.length} tokens, per task")
                add_tasks(page, group, styles)
    text, cells = folder / "results.md", folder / "cells.csv"
    text.write_text(page.text(), encoding="utf-8")
    pack(records, cells, {"command": command, "versions": used})
    return [text, cells, *page.draw(folder)]

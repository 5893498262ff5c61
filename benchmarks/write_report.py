#!/usr/bin/env python3
"""Writes docs/results.md and its pictures from what is committed in benchmarks/results.

``--check`` writes nothing and fails if the page is not what would be written; pictures are not
compared. Nothing but the committed files goes into the page, so the same files give the same one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report_data import Results, read_results  # noqa: E402
from benchmarks.report_papers import papers  # noqa: E402
from benchmarks.report_quality import (  # noqa: E402
    ablations,
    against_kvpress,
    full_caches,
    how_to_read,
    likelihoods,
    needles,
    other_tasks,
    per_task,
    query_agnostic,
    ruler,
    what_was_run,
)
from benchmarks.report_speed import speed  # noqa: E402
from vllm_kvcompress.tools.evaluation.document import Document  # noqa: E402
from vllm_kvcompress.tools.evaluation.task import EvaluationError  # noqa: E402

SECTIONS = (
    *(how_to_read, ruler, against_kvpress, per_task, query_agnostic, other_tasks, needles),
    *(likelihoods, ablations, full_caches, speed),
)


def build(results: Results, folder: str) -> Document:
    """The whole page, its pictures not yet drawn.

    Args:
        results: What is committed.
        folder: Where links find the pictures, relative to the page.

    """
    document = Document(folder)
    document.heading(1, "Results")
    document.add(
        "Written by `python -m benchmarks.write_report` from the files in benchmarks/results; "
        "what is changed here by hand is lost."
    )
    for section in SECTIONS:
        section(document, results)
    papers(document)
    what_was_run(document, results)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    args = parser.parse_args(argv)
    folder = args.out.with_suffix("")
    try:
        document = build(read_results(args.results), folder.name)
    except EvaluationError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        return _check(args.out, document)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(document.text(), encoding="utf-8")
    drawn = set(document.draw(folder)) if document.pictures else set()
    for path in set(folder.glob("*.png")) - drawn:  # of results that are there no more
        path.unlink()
    print(f"{args.out} and {len(drawn)} pictures")
    return 0


def _check(path: Path, document: Document) -> int:
    folder = path.with_suffix("")
    absent = [name for name in document.pictures if not (folder / name).is_file()]
    current = path.is_file() and path.read_text(encoding="utf-8") == document.text()
    if current and not absent:
        return 0
    what = f"lacks {', '.join(absent)}" if current else "is not what the committed results give"
    print(f"{path} {what}; run python -m benchmarks.write_report", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

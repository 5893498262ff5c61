#!/usr/bin/env python3
"""Writes docs/results.md, the pages under docs/results and their pictures.

All come from the files that are committed in benchmarks/results and from nothing else, so the same
files give the same pages. ``--check`` writes nothing and fails if a page is not what would be
written, or a picture is not there; the pictures' contents are not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report_quality  # noqa: E402
from benchmarks.report_data import Results, read_results  # noqa: E402
from benchmarks.report_speed import speed  # noqa: E402
from benchmarks.report_summary import opening, papers  # noqa: E402
from vllm_kvcompress.tools.evaluation.markdown_page import NOTES, MarkdownPage  # noqa: E402
from vllm_kvcompress.tools.evaluation.task import EvaluationError  # noqa: E402

START = "results.md"
GENERATED = (
    "Written by `python -m benchmarks.write_report` from the files in benchmarks/results; "
    "what is changed here by hand is lost."
)
HOW_TO_READ = "How to read the tables"


class Section(NamedTuple):
    """A page below the first one.

    Attributes:
        name: Name of its file, without the ending.
        title: Heading of the page.
        about: What it shows, for the table of contents.
        write: Function that appends the section to a page.

    """

    name: str
    title: str
    about: str
    write: Callable[[MarkdownPage, Results], None]


SECTIONS = (
    Section(
        *("ruler", "RULER by model, length and budget"),
        *("means over tasks, question compressed with the context", report_quality.ruler),
    ),
    Section(
        *("kvpress", "CAKE and DynamicKV against kvpress's SnapKV"),
        *("differences on the same prompts at the same bytes", report_quality.against_kvpress),
    ),
    Section(
        *("ruler-per-task", "RULER per task"),
        *("each task by itself, at every length and budget", report_quality.per_task),
    ),
    Section(
        *("query-agnostic", "Query-agnostic compression"),
        *("the question comes after the compression", report_quality.query_agnostic),
    ),
    Section(
        *("other-tasks", "Other tasks"),
        *("the same tasks as a chat, and others", report_quality.other_tasks),
    ),
    Section(
        *("needle-grid", "Needle grid"),
        *("one needle by depth and length", report_quality.needles),
    ),
    Section(
        *("likelihood", "Likelihood"),
        *("right answers and running text through the compressed cache",),
        report_quality.likelihoods,
    ),
    Section(
        *("ablations", "Ablations"),
        *("what the parts and parameters of the methods are worth", report_quality.ablations),
    ),
    Section(
        *("full-cache", "Full cache: do the sources agree?"),
        *("vLLM with and without this package, and transformers", report_quality.full_caches),
    ),
    Section(
        *("speed-and-memory", "Speed and memory"),
        *("steps, first tokens, throughput, blocks held", speed),
    ),
    Section(
        *("what-was-run", "What was run"),
        *("models, prompts, versions and commands of every file", report_quality.what_was_run),
    ),
)


def build(results: Results, folder: str) -> dict[str, MarkdownPage]:
    """Make all pages, their pictures not yet drawn.

    Args:
        results: The committed results.
        folder: Folder of all pages but the first one, relative to it.

    Returns:
        The pages by their paths, relative to the folder of the first one; sections on tasks that
        nobody has run have none.

    """
    start = MarkdownPage()
    start.heading(1, "Results")
    opening(start, results)
    pages = {START: start}
    contents = []
    for section in SECTIONS:
        path = f"{folder}/{section.name}.md"
        page = pages[path] = MarkdownPage()
        page.heading(1, section.title)
        page.add(f"{GENERATED} [{HOW_TO_READ}](../{START}#{_anchor(HOW_TO_READ)}).")
        section.write(page, results)
        contents.append(f"* [{section.title}]({path}): {section.about}")
    start.heading(2, "Contents")
    titles = (HOW_TO_READ, "What papers report")
    contents += [f"* [{title}](#{_anchor(title)})" for title in titles]
    start.add("\n".join(contents))
    start.heading(2, HOW_TO_READ)
    start.add("\n".join(f"* {note}" for note in NOTES), GENERATED)
    papers(start)
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of results.md")
    parser.add_argument("--check", action="store_true", help="only say whether all is current")
    args = parser.parse_args(argv)
    folder = args.out / Path(START).stem
    try:
        pages = build(read_results(args.results), folder.name)
    except EvaluationError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        return _check(args.out, pages)
    written = set()
    for name, page in pages.items():
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.text(), encoding="utf-8")
        written |= {path, *page.draw(path.parent)}
    for path in set(folder.iterdir()) - written:  # pages and pictures of earlier results
        path.unlink()
    print(f"{args.out / START}, {len(pages) - 1} further pages and their pictures")
    return 0


def _check(folder: Path, pages: Mapping[str, MarkdownPage]) -> int:
    for name, page in pages.items():
        path = folder / name
        absent = [name for name in page.pictures if not (path.parent / name).is_file()]
        current = path.is_file() and path.read_text(encoding="utf-8") == page.text()
        if not current or absent:
            what = "is not what the committed results give" if not current else ""
            what = what or f"lacks {', '.join(absent)}"
            print(f"{path} {what}; run python -m benchmarks.write_report", file=sys.stderr)
            return 1
    return 0


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/results.md, the pages under docs/results and their pictures.

All come from the files that are committed in benchmarks/results and from nothing else, so the same
files give the same pages. ``--check`` writes nothing and fails if a page is not what would be
written, or a picture is not there; the pictures' contents are not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report_quality as quality
from benchmarks.report_data import Results, read_results
from benchmarks.report_speed import speed
from benchmarks.report_summary import opening, papers
from vllm_kvcompress.tools.evaluation.markdown_page import MarkdownPage
from vllm_kvcompress.tools.evaluation.tables import NOTES
from vllm_kvcompress.tools.evaluation.task import EvaluationError

ROOT = Path(__file__).resolve().parent.parent
START = "results.md"
GENERATED = (
    "Written by `python -m benchmarks.write_report` from the files in benchmarks/results; "
    "what is changed here by hand is lost."
)
HOW_TO_READ = "How to read the tables"


SECTIONS = (
    ("ruler", "RULER by model, length and budget", quality.ruler),
    ("kvpress", "CAKE and DynamicKV against kvpress's SnapKV", quality.against_kvpress),
    ("ruler-per-task", "RULER per task", quality.per_task),
    ("query-agnostic", "Query-agnostic compression", quality.query_agnostic),
    ("other-tasks", "Other tasks", quality.other_tasks),
    ("needle-grid", "Needle grid", quality.needles),
    ("likelihood", "Likelihood", quality.likelihoods),
    ("ablations", "Ablations", quality.ablations),
    ("full-cache", "Full cache: do the sources agree?", quality.full_caches),
    ("speed-and-memory", "Speed and memory", speed),
    ("what-was-run", "What was run", quality.what_was_run),
)
"""File, heading and function of every page but the first. What it says of itself is in the
table of contents."""


def build(results: Results, folder: str) -> dict[str, MarkdownPage]:
    """Make all pages, their pictures not yet drawn.

    Args:
        results: The committed results.
        folder: Folder of all pages but the first one, relative to it.

    Returns:
        The pages by their paths, relative to the folder of the first one; sections without
        results have none.

    """
    start = MarkdownPage()
    start.heading(1, "Results")
    opening(start, results)
    pages = {START: start}
    contents = []
    for name, title, write in SECTIONS:
        path = f"{folder}/{name}.md"
        page = MarkdownPage()
        write(page, results)
        if page.parts:
            reading = f"[{HOW_TO_READ}](../{START}#{_anchor(HOW_TO_READ)})"
            page.parts[:0] = [f"# {title}", f"{GENERATED} {reading}."]
            pages[path] = page
            contents.append(f"* [{title}]({path}). {write.__doc__}")
    start.heading(2, "Contents")
    titles = (HOW_TO_READ, "What papers report")
    contents += [f"* [{title}](#{_anchor(title)})" for title in titles]
    start.add("\n".join(contents))
    start.heading(2, HOW_TO_READ)
    start.add(NOTES, GENERATED)
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
        what = f"lacks {', '.join(absent)}" if absent else ""
        if not path.is_file() or path.read_text(encoding="utf-8") != page.text():
            what = "is not what the committed results give"
        if what:
            print(f"{path} {what}; run python -m benchmarks.write_report", file=sys.stderr)
            return 1
    return 0


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())

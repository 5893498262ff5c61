"""Section of docs/results.md on speed and memory, as the benchmarks measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report_data import Results
from vllm_kvcompress.tools.bench.report import LEGEND
from vllm_kvcompress.tools.bench.rows import BUDGET_COLUMNS, COLUMNS, NOTHING, title_of
from vllm_kvcompress.tools.bench.rows import HEADINGS as BENCH_HEADINGS
from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.markdown_page import MarkdownPage

RATIO, SPREAD, ROUNDS = "ratio", "spread", "ratio_rounds"

HEADINGS = {
    "engine": "One engine: decode steps and time to first token",
    "capacity": "How many requests fit, and the throughput that follows",
    "cpu-cuts": "What a cut alone costs on the CPU, against an earlier build in the same run",
}

FASTER, SLOWER, NOISE = "pays", "does not pay", "within the spread"


def speed(page: MarkdownPage, results: Results) -> None:
    """Times of steps and first tokens, throughput and blocks held, against plain vLLM."""
    if not results.speed:
        return
    page.add(
        "Every row is compression against plain vLLM with the same settings, the two taking turns. "
        "A ratio above 1 means that compression is faster: less time, or more tokens a second. "
        "Columns are named as in the files in benchmarks/results; those that are equal in all rows "
        "stand above the table."
    )
    for name, rows in results.speed.items():
        page.heading(2, HEADINGS.get(name, name))
        is_bench = set(COLUMNS) - BUDGET_COLUMNS <= set(rows[0])
        (_add_bench if is_bench else _add)(page, rows)


def verdict(row: Mapping[str, str]) -> str:
    """Whether a row's ratio is above 1, in all of its runs where their spread is known."""
    low, high = _ends(row)
    if low > 1:
        return FASTER
    return SLOWER if high < 1 else NOISE


def _runs(row: Mapping[str, str]) -> str:
    """A remark for rows without a spread."""
    return "" if row.get(SPREAD) or len(row.get(ROUNDS, "").split()) > 1 else ", one run"


def _add(page: MarkdownPage, rows: Sequence[Mapping[str, str]]) -> None:
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    same = [name for name in columns if len({row[name] for row in rows}) == 1]
    shown = [name for name in columns if len(rows) == 1 or name not in same]
    if len(rows) > 1 and same:
        page.add(", ".join(f"{_words(name)} {rows[0][name]}" for name in same) + ".")
    rated = [row for row in rows if row.get(RATIO)]
    head = [*map(_words, shown), *(["compression"] if rated else [])]
    lines = []
    for row in sorted(rows, key=lambda row: _place(rows, row)):
        line = [row[name] for name in shown]
        if rated:
            line.append(verdict(row) + _runs(row) if row.get(RATIO) else tables.MISSING)
        lines.append(line)
    page.add(tables.table(head, lines))
    if rated:
        words = [verdict(row) for row in rated]
        page.add(
            f"Compression {FASTER} in {words.count(FASTER)} of {len(words)} rows, {SLOWER} in "
            f"{words.count(SLOWER)}; in {words.count(NOISE)} the spread of the runs includes 1."
        )


def _add_bench(page: MarkdownPage, rows: Sequence[Mapping[str, str]]) -> None:
    """Rows of ``kvcompress bench``, as its own page shows them."""
    facts = [name for name in rows[0] if name not in COLUMNS and rows[0][name]]
    page.add(LEGEND)
    page.add("\n".join(f"* {_words(name)}: `{rows[0][name]}`" for name in facts))
    lines = []
    for row in rows:
        low, high = (float(row[name]) for name in ("ratio_min", "ratio_max"))
        spread = "" if len(row[ROUNDS].split()) == 1 else f" ({low:.2f}-{high:.2f})"
        lines.append(
            [
                _title(row),
                *(f"{row[name]} {row['unit']}" for name in ("plain", "compressed")),
                f"{float(row[RATIO]):.2f}{spread}",
                f"{float(row['byte_bound']):.2f}" if row["byte_bound"] else NOTHING,
                f"{row['budget_plain']} {row['unit']} ({float(row['budget_ratio']):.2f})"
                if row.get("budget_plain")
                else NOTHING,
                *(_both(row, name) for name in ("blocks", "running")),
                row["verdict"] if low > 1 else f"**{row['verdict']}**",
            ]
        )
    page.add(tables.table(BENCH_HEADINGS, lines))
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in filter(None, row["notes"].split("; ")):
            notes.setdefault(note, []).append(_title(row))
    page.add("\n".join(f"* {'; '.join(names)}: {note}" for note, names in notes.items()))


def _title(row: Mapping[str, str]) -> str:
    prompt, requests, generated = (
        int(row[name]) if row[name] else None for name in ("prompt", "requests", "generated")
    )
    return title_of(row["case"], prompt, requests, generated, row["pool"])


def _both(row: Mapping[str, str], name: str) -> str:
    plain, compressed = row[f"{name}_plain"], row[f"{name}_compressed"]
    return f"{plain} -> {compressed}" if plain else NOTHING


def _place(rows: Sequence[Mapping[str, str]], row: Mapping[str, str]) -> int:
    """Place of the first run of the same case, so that runs of a case stand together."""
    keys = ("case", "model", "what")
    return next(i for i, r in enumerate(rows) if all(r.get(k) == row.get(k) for k in keys))


def _ends(row: Mapping[str, str]) -> tuple[float, float]:
    """Least and greatest ratio: of a spread such as ``0.956-1.135``, of the rounds, or the one."""
    low, _, high = row.get(SPREAD, "").partition("-")
    if low and high:
        return float(low), float(high)
    ratios = [float(word) for word in (row.get(ROUNDS) or row[RATIO]).split()]
    return min(ratios), max(ratios)


def _words(column: str) -> str:
    return column.replace("_", " ")

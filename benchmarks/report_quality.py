"""Sections of docs/results.md on quality; each is left out, with a line, without its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.report_data import Packed, Results
from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.cells import Cell, Difference, average, paired
from vllm_kvcompress.tools.evaluation.document import (
    NOTES,
    RULER,
    Document,
    add_needles,
    add_panels,
    add_tasks,
    is_needles,
    nearest,
    title,
)
from vllm_kvcompress.tools.evaluation.looks import Look, looks_of
from vllm_kvcompress.tools.evaluation.panels import OURS, Panel, Row, by_length
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE
from vllm_kvcompress.tools.evaluation.report import SHOWN

MEASURED = ("cake", "dynamickv", "cake, faithful", "dynamickv, faithful")
"""Settings that are held against kvpress's SnapKV."""

SAME_SHARE = 0.005
"""Shares of the cache that differ by no more count as the same bytes."""

OF_ABLATIONS = ("about", "reference")
"""Notes that are told with the figures."""

AHEAD, LEVEL, BEHIND = "ahead", "level", "behind"


def how_to_read(document: Document, results: Results) -> None:
    """What all tables and pictures have in common."""
    if results.quality or results.ablations:
        document.add("\n".join(f"* {note}" for note in NOTES))


def what_was_run(document: Document, results: Results) -> None:
    """Every file with its models, tasks, prompts, seeds, versions and command line."""
    document.heading(2, "What was run")
    files = [*results.quality, *results.ablations]
    if not files:
        missing(document, "benchmarks/results/quality/*.csv")
        return
    head = ["file", "models", "tasks", "tokens", "protocols", "prompts a cell", "answered by"]
    document.add(tables.table(head, [_run(file) for file in files]))
    names = [name for file in files for name in file.notes if name not in OF_ABLATIONS]
    columns = list(dict.fromkeys(names))
    if columns:
        rows = [
            [file.name, *(file.notes.get(name, tables.MISSING) for name in columns)]
            for file in files
        ]
        document.add(tables.table(["file", *columns], rows))


def ruler(document: Document, results: Results) -> None:
    """RULER, the question compressed with the context."""
    document.heading(2, "RULER by model, length and budget")
    chosen = _chosen(results, lambda panel: panel.family == RULER, AWARE)
    _groups(document, results, chosen, "RULER with query-aware compression")


def against_kvpress(document: Document, results: Results) -> None:
    """CAKE and DynamicKV minus kvpress's SnapKV on the same prompts at every budget."""
    document.heading(2, "CAKE and DynamicKV against kvpress's SnapKV")
    panels = [panel for panel in results.panels if not panel.likelihood and _references(panel)]
    if not panels:
        missing(document, "SnapKV as kvpress has it")
        return
    document.add(
        "Points of the mean over tasks, ours minus kvpress's SnapKV, on the prompts that both have "
        f"answered. {AHEAD.capitalize()} and {BEHIND} where the 95 % interval leaves out 0, "
        f"{LEVEL} else."
    )
    for group in by_length(panels):
        document.heading(3, title(group))
        budgets = list(dict.fromkeys(budget for panel in group for budget in panel.budgets))
        words: dict[str, list[str]] = {}
        lines = [
            line
            for panel in group
            for reference in _references(panel)
            for line in _against(panel, reference, budgets, words)
        ]
        head = ["tokens", "ours", "theirs", "pairs", *map(tables.budget_text, budgets)]
        document.add(tables.table(head, lines))
        document.add("\n".join(_tally(name, found) for name, found in words.items()))


def per_task(document: Document, results: Results) -> None:
    """RULER's tasks by themselves."""
    document.heading(2, "RULER per task")
    panels = [
        panel
        for panel in _chosen(results, lambda panel: panel.family == RULER, AWARE)
        if len(panel.tasks) > 1 and panel.budgets
    ]
    if not panels:
        missing(document, "several tasks of RULER")
    looks = looks_of(results.panels)
    for group in by_length(panels):
        document.heading(3, title(group))
        for panel in group:
            document.heading(4, f"{panel.length} tokens")
            add_tasks(document, panel, looks, panel.budgets, nearest(panel, SHOWN))


def query_agnostic(document: Document, results: Results) -> None:
    """Everything that was compressed before the question, but needles and likelihoods."""
    document.heading(2, "Query-agnostic compression")
    chosen = _chosen(results, lambda panel: not is_needles(panel), AGNOSTIC)
    _groups(document, results, chosen, "query-agnostic compression")


def other_tasks(document: Document, results: Results) -> None:
    """Families besides RULER, such as LongBench; nothing at all where there are none."""

    def other(panel: Panel) -> bool:
        return panel.family != RULER and not is_needles(panel)

    chosen = _chosen(results, other, AWARE)
    if chosen:
        document.heading(2, "Other tasks")
        _groups(document, results, chosen, "other tasks")


def needles(document: Document, results: Results) -> None:
    """Heat maps, and tables over all depths."""
    document.heading(2, "Needle grid")
    panels = [panel for panel in results.panels if not panel.likelihood and is_needles(panel)]
    if not panels:
        missing(document, "the needle grid")
    looks = looks_of(results.panels)
    for group in by_length(panels):
        add_panels(document, group, looks, 3, against_full=False)
        add_needles(document, group)


def likelihoods(document: Document, results: Results) -> None:
    """Nats per token through the compressed cache, and differences to the full one."""
    document.heading(2, "Likelihood")
    panels = [panel for panel in results.panels if panel.likelihood]
    if not panels:
        missing(document, "likelihoods")
    for group in by_length(panels):
        add_panels(document, group, looks_of(results.panels), 3, against_full=True)


def ablations(document: Document, results: Results) -> None:
    """What a part is worth: every file's labels, and their differences to one of them."""
    document.heading(2, "Ablations")
    if not results.ablations:
        missing(document, "benchmarks/results/quality/ablation*.csv")
    for file in results.ablations:
        document.heading(3, file.name.removeprefix("ablation").strip("_-") or file.name)
        if "about" in file.notes:
            document.add(file.notes["about"])
        for panel in file.panels:
            document.add(tables.header(panel), tables.means(panel))
            reference = _ablated(file, panel)
            if reference is not None and len(panel.compressed) > 1:
                document.add(
                    "Difference on the same prompts:", tables.differences(panel, reference)
                )


def full_caches(document: Document, results: Results) -> None:
    """Whether our harness gets what others get where nothing is compressed."""
    document.heading(2, "Full cache: do the sources agree?")
    groups: dict[tuple[str, str, str, int], dict[str, dict[str, Cell]]] = {}
    for panel in results.panels:
        for cell in (cell for cell in panel.cells if cell.full and cell.scores):
            key = (panel.model, panel.family, panel.protocol, panel.length)
            name = f"{cell.source}, {cell.dtype}"
            # Blocks make no difference to a full cache: the first size stands for all.
            groups.setdefault(key, {}).setdefault(name, {}).setdefault(cell.task, cell)
    lines = []
    for (model, family, protocol, length), sources in groups.items():
        names = sorted(sources, key=lambda name: (not name.startswith(OURS), name))
        first = list(sources[names[0]].values())
        for name in names[1:]:
            second = list(sources[name].values())
            lines.append(
                [
                    *(f"{model}, {family}, {protocol}, {length} tokens", names[0], name),
                    *(tables.interval(average(first)), tables.interval(average(second))),
                    *_agreement(paired(second, first)),
                ]
            )
    if not lines:
        missing(document, "a full cache answered by two sources")
        return
    document.add(
        "Scores in per cent over the prompts of each; the difference, second minus first, is over "
        "the prompts that both have answered."
    )
    head = ["prompts", "first", "second", "first's score", "second's score", "difference"]
    document.add(tables.table([*head, "pairs", "pairs whose scores differ"], lines))


def missing(document: Document, what: str) -> None:
    """Say that a section has no figures."""
    document.add(f"*The figures are missing: no results of {what} are committed.*")


def _chosen(results: Results, wanted: Callable[[Panel], bool], protocol: str) -> list[Panel]:
    return [
        panel
        for panel in results.panels
        if not panel.likelihood and panel.protocol == protocol and wanted(panel)
    ]


def _groups(document: Document, results: Results, panels: Sequence[Panel], what: str) -> None:
    if not panels:
        missing(document, what)
    looks: Mapping[Row, Look] = looks_of(results.panels)
    for group in by_length(panels):
        add_panels(document, group, looks, 3, against_full=False)


def _run(file: Packed) -> list[str]:
    cells = [cell for panel in file.panels for cell in panel.cells]
    counts = sorted({cell.n for cell in cells})
    prompts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [
        file.name,
        ", ".join(sorted({f"{cell.model} ({cell.dtype})" for cell in cells})),
        ", ".join(f"{len(tasks)} of {family}" for family, tasks in _families(file).items()),
        ", ".join(map(str, sorted({cell.length for cell in cells}))),
        ", ".join(sorted({cell.protocol for cell in cells}, reverse=True)),
        f"{prompts}; {tables.seeds_text(cells)}",
        ", ".join(sorted({cell.source for cell in cells})),
    ]


def _families(file: Packed) -> dict[str, set[str]]:
    families: dict[str, set[str]] = {}
    for panel in file.panels:
        families.setdefault(panel.family, set()).update(panel.tasks)
    return families


def _references(panel: Panel) -> list[Row]:
    """kvpress's SnapKV, with its defaults and with other parameters."""
    return list(
        dict.fromkeys(
            Row(cell.label, cell.source, cell.block_size, full=False)
            for cell in panel.cells
            if cell.source.lower().startswith("kvpress") and not cell.full and _is_snapkv(cell)
        )
    )


def _is_snapkv(cell: Cell) -> bool:
    """Whether its method is called that or SnapKVPress."""
    return cell.method.rpartition("/")[2].lower().removesuffix("press") == "snapkv"


def _against(
    panel: Panel, reference: Row, budgets: Sequence[str], words: dict[str, list[str]]
) -> list[list[str]]:
    """A line per setting of ours; ``words``, verdicts by name, is added to."""
    lines = []
    for row in panel.compressed:
        if not row.ours or row.label not in MEASURED:
            continue
        line, pairs = [], set()
        for budget in budgets:
            difference = panel.difference(row, budget, reference)
            if difference is None:
                line.append(tables.MISSING)
                continue
            pairs.add(difference.pairs)
            word = verdict(difference)
            name = f"{panel.names[row]} against {panel.names[reference]}"
            words.setdefault(name, []).append(word)
            text = f"{tables.signed(difference.estimate)} {word}"
            line.append(text + _other_bytes(panel, row, reference, budget))
        if pairs:
            counts = " to ".join(str(count) for count in sorted({min(pairs), max(pairs)}))
            lines.append(
                [str(panel.length), panel.names[row], panel.names[reference], counts, *line]
            )
    return lines


def verdict(difference: Difference) -> str:
    """Ahead, level or behind."""
    if difference.estimate.low > 0:
        return AHEAD
    return BEHIND if difference.estimate.high < 0 else LEVEL


def _other_bytes(panel: Panel, row: Row, reference: Row, budget: str) -> str:
    ours, theirs = panel.share(row, budget), panel.share(reference, budget)
    if ours is None or theirs is None or abs(ours - theirs) <= SAME_SHARE:
        return ""
    return f"; holds {tables.share_text(ours)} against {tables.share_text(theirs)}"


def _tally(name: str, words: Sequence[str]) -> str:
    counts = ", ".join(f"{words.count(word)} {word}" for word in (AHEAD, LEVEL, BEHIND))
    return f"* {name}: {counts} of {len(words)}."


def _ablated(file: Packed, panel: Panel) -> Row | None:
    """The row of the note ``reference``, or the first one."""
    label = file.notes.get("reference")
    rows = [row for row in panel.compressed if label in (None, row.label)]
    return next(iter(rows), None)


def _agreement(difference: Difference | None) -> list[str]:
    if difference is None:
        return [tables.MISSING, "0", tables.MISSING]
    unequal = difference.higher + difference.lower
    return [tables.signed(difference.estimate), str(difference.pairs), str(unequal)]

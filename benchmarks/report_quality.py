"""Pages of docs/results.md on quality; a function adds nothing where there are no results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pandas as pd

from benchmarks.report_data import PackedFile, Results
from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.markdown_page import (
    RULER,
    MarkdownPage,
    add_groups,
    add_tasks,
    is_needles,
)
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE
from vllm_kvcompress.tools.evaluation.result_groups import (
    OURS,
    Difference,
    ResultGroup,
    SettingRow,
    by_length,
    by_prompt,
    make_groups,
    paired,
    strata,
)
from vllm_kvcompress.tools.evaluation.results_frame import cell_means
from vllm_kvcompress.tools.evaluation.stats import mean_score
from vllm_kvcompress.tools.evaluation.styles import styles_for

MEASURED = ("cake", "dynamickv", "cake, faithful", "dynamickv, faithful")
"""Settings that are compared with kvpress's SnapKV."""

SAME_SHARE = 0.005
"""Shares of the cache that differ by no more count as the same bytes."""

OF_ABLATIONS = ("about", "reference")
"""Notes that are shown with the figures of an ablation."""

NOT_MEASURED = "not measured"
"""Note that names tasks of a run that have no answers yet; packing the run anew drops it."""

AHEAD, LEVEL, BEHIND = "ahead", "level", "behind"


def what_was_run(page: MarkdownPage, results: Results) -> None:
    """Models, tasks, prompts, seeds, versions and command line of every file."""
    files = [*results.quality, *results.ablations]
    if not files:
        return
    head = ["file", "models", "tasks", "tokens", "protocols", "prompts a cell", "answered by"]
    page.add(tables.table(head, [_run(file) for file in files]))
    names = [name for file in files for name in file.notes if name not in OF_ABLATIONS]
    columns = list(dict.fromkeys(names))
    if columns:
        rows = [
            [file.name, *(file.notes.get(name, tables.MISSING) for name in columns)]
            for file in files
        ]
        page.add(tables.table(["file", *columns], rows))


def ruler(page: MarkdownPage, results: Results) -> None:
    """Means over RULER's tasks; the question is compressed with the context."""
    _add(page, results, lambda group: group.family == RULER and _scored(group, AWARE))


def against_kvpress(page: MarkdownPage, results: Results) -> None:
    """Differences on the same prompts, with the same number of bytes."""
    groups = [group for group in results.groups if not group.likelihood and _references(group)]
    if not groups:
        return
    page.add(
        "Points of the mean over tasks, ours minus kvpress's SnapKV, on the prompts that both have "
        f"answered. {AHEAD.capitalize()} and {BEHIND} where the 95 % interval leaves out 0, "
        f"{LEVEL} else."
    )
    for series in by_length(groups):
        page.heading(2, series[0].title)
        budgets = list(dict.fromkeys(budget for group in series for budget in group.budgets))
        words: dict[str, list[str]] = {}
        lines = [
            line
            for group in series
            for reference in _references(group)
            for line in _against(group, reference, budgets, words)
        ]
        head = ["tokens", "ours", "theirs", "pairs", *map(tables.budget_text, budgets)]
        page.add(tables.table(head, lines))
        page.add("\n".join(_tally(name, found) for name, found in words.items()))


def per_task(page: MarkdownPage, results: Results) -> None:
    """Each of RULER's tasks by itself, at every length and budget."""
    groups = [
        group
        for group in results.groups
        if group.family == RULER and _scored(group, AWARE)
        if len(group.tasks) > 1 and group.budgets
    ]
    styles = styles_for(results.groups)
    lacking = [file for file in results.quality if NOT_MEASURED in file.notes]
    if lacking:
        page.add("\n".join(f"* {f.name}: not measured: {f.notes[NOT_MEASURED]}." for f in lacking))
    for series in by_length(groups):
        page.heading(2, series[0].title)
        for group in series:
            page.heading(3, f"{group.length} tokens")
            add_tasks(page, group, styles)


def query_agnostic(page: MarkdownPage, results: Results) -> None:
    """The same tasks, compressed before the question is known."""
    _add(page, results, lambda group: _scored(group, AGNOSTIC))


def other_tasks(page: MarkdownPage, results: Results) -> None:
    """Tasks besides RULER, such as RULER's tasks as a chat."""
    _add(page, results, lambda group: group.family != RULER and _scored(group, AWARE))


def needles(page: MarkdownPage, results: Results) -> None:
    """One needle, by its depth and the length of the prompt."""
    _add(page, results, lambda group: is_needles(group) and not group.likelihood)


def likelihoods(page: MarkdownPage, results: Results) -> None:
    """Likelihood of right answers and of running text through the compressed cache."""
    _add(page, results, lambda group: group.likelihood, against_full=True)


def ablations(page: MarkdownPage, results: Results) -> None:
    """What the parts and parameters of the methods are worth."""
    for file in results.ablations:
        page.heading(2, file.name.removeprefix("ablation").strip("_-") or file.name)
        if "about" in file.notes:
            page.add(file.notes["about"])
        for group in make_groups(file.frame):
            page.add(tables.header(group), tables.means(group))
            label = file.notes.get("reference")
            rows = [row for row in group.compressed if label in (None, row.label)]
            if rows and len(group.compressed) > 1:
                differences = tables.differences(group, rows[0])
                page.add("Difference on the same prompts:", differences)


def full_caches(page: MarkdownPage, results: Results) -> None:
    """vLLM with and without this package, and transformers, where nothing is compressed."""
    found: dict[tuple[str, str, str, str], dict[str, pd.DataFrame]] = {}
    for group in results.groups:
        if group.likelihood:
            continue
        key = (group.model, group.family, group.protocol, f"{group.length} tokens")
        for source, frame in group.frame[group.frame["budget"] == ""].groupby("source"):
            # Blocks make no difference to a full cache: the first size stands for all.
            one = frame.drop_duplicates(["task", "seed", "index"])
            found.setdefault(key, {})[f"{source}, {group.dtype}"] = by_prompt(one)
    lines = []
    for prompts, sources in found.items():
        first, *others = sorted(sources, key=lambda name: (not name.startswith(OURS), name))
        for other in others:
            both = sources[first], sources[other]
            means = (tables.interval(mean_score(strata(one["value"]))) for one in both)
            line = [", ".join(prompts), first, other, *means]
            lines.append([*line, *_agreement(paired(both[1], both[0]))])
    if not lines:
        return
    page.add(
        "Scores in per cent over the prompts of each; the difference, second minus first, is over "
        "the prompts that both have answered."
    )
    head = ["prompts", "first", "second", "first's score", "second's score", "difference"]
    page.add(tables.table([*head, "pairs", "pairs whose scores differ"], lines))


def _scored(group: ResultGroup, protocol: str) -> bool:
    """Whether a group has scores of a protocol, and no needles, which have a page of their own."""
    return group.protocol == protocol and not group.likelihood and not is_needles(group)


def _add(
    page: MarkdownPage,
    results: Results,
    wanted: Callable[[ResultGroup], bool],
    *,
    against_full: bool = False,
) -> None:
    styles = styles_for(results.groups)
    for series in by_length(list(filter(wanted, results.groups))):
        add_groups(page, series, styles, against_full=against_full)


def _run(file: PackedFile) -> list[str]:
    cells = cell_means(file.frame)
    families = Counter(task.partition("/")[0] for task in sorted(set(cells["task"])))
    return [
        file.name,
        ", ".join(sorted(set(cells["model"] + " (" + cells["dtype"] + ")"))),
        ", ".join(f"{n} of {family}" for family, n in families.items()),
        ", ".join(map(str, sorted(set(cells["length"])))),
        ", ".join(sorted(set(cells["protocol"]), reverse=True)),
        f"{tables.span(cells['prompts'])}; {tables.seeds_text(file.frame['seed'])}",
        ", ".join(sorted(set(cells["source"]))),
    ]


def _references(group: ResultGroup) -> list[SettingRow]:
    """kvpress's SnapKV, with its defaults and with other parameters."""
    snapkv = set(group.frame.loc[group.frame["method"] == "snapkv", "label"])
    return [
        row for row in group.compressed if row.source.startswith("kvpress") and row.label in snapkv
    ]


def _against(
    group: ResultGroup, reference: SettingRow, budgets: Sequence[str], words: dict[str, list[str]]
) -> list[list[str]]:
    """A line per setting of ours; ``words``, verdicts by name, is added to."""
    lines = []
    for row in group.compressed:
        if not row.ours or row.label not in MEASURED:
            continue
        line, pairs = [], set()
        for budget in budgets:
            difference = group.difference(row, budget, reference)
            if difference is None:
                line.append(tables.MISSING)
                continue
            pairs.add(difference.estimate.n)
            word = verdict(difference)
            name = f"{group.names[row]} against {group.names[reference]}"
            words.setdefault(name, []).append(word)
            text = f"{tables.signed(difference.estimate)} {word}"
            line.append(text + _other_bytes(group, row, reference, budget))
        if pairs:
            counts = " to ".join(str(count) for count in sorted({min(pairs), max(pairs)}))
            lines.append(
                [str(group.length), group.names[row], group.names[reference], counts, *line]
            )
    return lines


def verdict(difference: Difference) -> str:
    """Ahead, level or behind."""
    if difference.estimate.low > 0:
        return AHEAD
    return BEHIND if difference.estimate.high < 0 else LEVEL


def _other_bytes(group: ResultGroup, row: SettingRow, reference: SettingRow, budget: str) -> str:
    ours, theirs = group.share(row, budget), group.share(reference, budget)
    if ours is None or theirs is None or abs(ours - theirs) <= SAME_SHARE:
        return ""
    return f"; holds {tables.share_text(ours)} against {tables.share_text(theirs)}"


def _tally(name: str, words: Sequence[str]) -> str:
    counts = ", ".join(f"{words.count(word)} {word}" for word in (AHEAD, LEVEL, BEHIND))
    return f"* {name}: {counts} of {len(words)}."


def _agreement(difference: Difference | None) -> list[str]:
    if difference is None:
        return [tables.MISSING, "0", tables.MISSING]
    unequal = difference.higher + difference.lower
    return [tables.signed(difference.estimate), str(difference.estimate.n), str(unequal)]

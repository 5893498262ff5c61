"""Groups of results as Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from math import exp

import pandas as pd

from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE
from vllm_kvcompress.tools.evaluation.result_groups import Difference, ResultGroup, SettingRow
from vllm_kvcompress.tools.evaluation.stats import Estimate

PROTOCOL_NOTES = {
    AWARE: "the question is part of what is compressed",
    AGNOSTIC: "the context is compressed before the question is known",
}

MISSING = "\u2013"

NOTES = """\
* Budgets are tokens that a layer holds on average after the prefill, its window included, given \
as a number or as a share of the prompt and rounded up to whole blocks; the row *held* says what \
came of it.
* In brackets the 95 % confidence interval: Wilson's for right or wrong answers, a bootstrap over \
the prompts of each task for all others. Means over tasks count every task alike.
* Bold: the best of a column, where on the same prompts the interval of its difference to the \
next best leaves out 0.
* The full cache has no budget; its figure is repeated in every column."""
"""Remarks that a reader of the tables has to know."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers stand to the right, but never the first."""
    body = [list(row) for row in rows]
    numbers = [all(_is_number(row[place]) for row in body) for place in range(len(head))]
    marks = ["---:" if place and number else "---" for place, number in enumerate(numbers)]
    lines = [head, marks, *body]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def per_cent(value: float) -> str:
    """A share with one decimal, its sign kept from being that of zero."""
    return f"{_round(100 * value, 1):.1f}"


def share_text(value: float) -> str:
    """A share such as ``12.5 %``."""
    return f"{per_cent(value).removesuffix('.0')} %"


def interval(estimate: Estimate, digits: int = 1) -> str:
    """A score such as ``83.1 [80.2, 85.6]``, in per cent; the ends have ``digits`` decimals."""
    low, high = (f"{_round(100 * end, digits):.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{per_cent(estimate.value)} [{low}, {high}]"


def signed(estimate: Estimate, scale: float = 100, digits: int = 1) -> str:
    """A difference such as ``+3.2 [-0.4, +6.8]``."""
    value, low, high = (
        f"{_round(scale * end, digits):+.{digits}f}"
        for end in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def budget_text(budget: str) -> str:
    """A budget as on the command line, as ``12.5 %`` or ``512 tokens``."""
    number = float(budget)
    return share_text(number) if "." in budget and number <= 1 else f"{number:g} tokens"


def task_name(task: str) -> str:
    """A task without its family."""
    return task.partition("/")[2] or task


def held_text(group: ResultGroup, budget: str) -> str:
    """Tokens that rows hold at a budget: ``128 tokens, 12.6 %``, or from least to most."""
    tokens = group.cells.loc[group.cells["budget"] == budget, "kept_tokens"]
    low, high = group.shares(budget)
    return f"{span(tokens)} tokens, {_join(per_cent(low), per_cent(high))} %"


def header(group: ResultGroup) -> str:
    """A paragraph that says what the figures of a group are."""
    cells = group.cells
    prompts = f"{span(cells['prompts'])} prompt{'' if cells['prompts'].max() == 1 else 's'}"
    blocks = sorted(set(cells.loc[cells["budget"] != "", "block_size"]))
    note = PROTOCOL_NOTES.get(group.protocol, "")
    tokens = span(cells["prompt_tokens"])
    sentences = [
        f"Model {group.model}, {group.dtype}",
        f"Protocol {group.protocol}{': ' if note else ''}{note}",
        f"{_count(len(group.tasks), 'task')} of {group.length} tokens (compressed: {tokens})",
        f"{prompts} a task, setting and budget, {seeds_text(group.frame['seed'])}",
    ]
    if blocks:
        sentences.append(f"Blocks of {' and '.join(map(str, blocks))} tokens")
    if group.likelihood:
        sentences.append("Nats per token and, as ppl, the exponential of their mean")
    sentences.append(f"Answered by {', '.join(sorted(set(cells['source'])))}")
    return ". ".join(sentences) + "."


def means(group: ResultGroup, rows: Sequence[SettingRow] | None = None) -> str:
    """Settings by budgets: mean over the tasks in per cent, or nats per token.

    Settings without a mean, because they lack a task at every budget, are named below the table.

    Args:
        group: The results.
        rows: Rows to show; None: all of them.

    """
    what = "mean over tasks" if len(group.tasks) > 1 else group.tasks[0]
    head = [what, *(map(budget_text, group.budgets) if group.budgets else ["full cache"])]
    budgets = group.budgets or ("",)
    bold = {budget: _ahead(group, budget) for budget in budgets}
    lines = [["*held*", *(held_text(group, budget) for budget in budgets)]] if group.budgets else []
    partly = []
    for row in group.rows if rows is None else rows:
        if any(group.mean(row, budget) for budget in budgets):
            found = [_mean(group, row, budget, bold[budget]) for budget in budgets]
            lines.append([group.names[row], *found])
        else:
            count = max(len(group.tasks_of(row, budget)) for budget in budgets)
            partly.append(f"{group.names[row]} ({count} of {len(group.tasks)})")
    text = table(head, lines)
    return f"{text}\n\nOnly some of the tasks: {'; '.join(partly)}." if partly else text


def tasks(group: ResultGroup, budget: str) -> str:
    """Tasks by settings at one budget: scores in per cent, or nats per token.

    Of several full caches the one that others are compared with is shown; intervals of a single
    task are wide, so their ends have no decimals.
    """
    rows = [row for row in (group.full, *group.compressed) if row is not None]
    found = {row: group.task_means(row, budget) for row in rows}
    found = {row: values for row, values in found.items() if values}
    one = _nats if group.likelihood else partial(interval, digits=0)
    lines = [
        [task_name(task), *(one(v[task]) if task in v else MISSING for v in found.values())]
        for task in group.tasks
    ]
    if len(group.tasks) > 1:
        lines.append(["*mean*", *(_mean(group, row, budget, None) for row in found)])
    head = [f"task, {budget_text(budget)}", *(group.names[row] for row in found)]
    return table(head, lines)


def differences(group: ResultGroup, reference: SettingRow) -> str:
    """Settings by budgets: paired difference to a setting, in points or in nats per token.

    Args:
        group: The results.
        reference: Row of the group to compare with; at the same budget, or the full cache.

    """
    found: dict[SettingRow, list[Difference | None]] = {}
    for row in group.compressed:
        line = [group.difference(row, budget, reference) for budget in group.budgets]
        if row != reference and any(line):
            found[row] = line
    counts = {difference.estimate.n for line in found.values() for difference in line if difference}
    head = f"minus {group.names[reference]}"
    if len(counts) == 1:
        head += f", {_count(counts.pop(), 'pair')}"
    lines = [
        [group.names[row], *(_difference(group, d, pairs=bool(counts)) for d in line)]
        for row, line in found.items()
    ]
    return table([head, *map(budget_text, group.budgets)], lines)


def span(numbers: pd.Series) -> str:
    """Smallest and largest number, rounded to whole ones: ``128 to 256``, or ``128``."""
    return _join(f"{numbers.min():.0f}", f"{numbers.max():.0f}")


def seeds_text(values: Iterable[int]) -> str:
    """Seeds, such as ``seeds 0 to 4``."""
    seeds = sorted(set(values))
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _difference(group: ResultGroup, difference: Difference | None, *, pairs: bool) -> str:
    if difference is None:
        return MISSING
    estimate = difference.estimate
    text = signed(estimate, 1, 3) if group.likelihood else signed(estimate)
    return f"{text}, {_count(difference.estimate.n, 'pair')}" if pairs else text


def _ahead(group: ResultGroup, budget: str) -> SettingRow | None:
    """The compressed row that is better than the next one by more than the interval."""
    sign = -1 if group.likelihood else 1
    found = [
        (sign * mean.value, row)
        for row in group.compressed
        if (mean := group.mean(row, budget)) is not None
    ]
    if len(found) < 2:
        return None
    (_, best), (_, second), *_ = sorted(found, key=lambda item: -item[0])
    difference = group.difference(best, budget, second)
    if difference is None:
        return None
    low, high = difference.estimate.low, difference.estimate.high
    return best if (high < 0 if group.likelihood else low > 0) else None


def _mean(group: ResultGroup, row: SettingRow, budget: str, bold: SettingRow | None) -> str:
    estimate = group.mean(row, budget)
    if estimate is None:
        count = len(group.tasks_of(row, budget))
        return f"{count} of {len(group.tasks)} tasks" if count else MISSING
    text = _nats(estimate) if group.likelihood else interval(estimate)
    value, _, rest = text.partition(" ")
    return f"**{value}** {rest}" if row == bold else text


def _nats(estimate: Estimate) -> str:
    value, low, high = (f"{end:.3f}" for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}], ppl {exp(estimate.value):.2f}"


def _round(value: float, digits: int) -> float:
    """Rounded, what arithmetic left in the last digits first, and never minus zero."""
    return round(round(value, 9), digits) + 0.0


def _join(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _count(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _is_number(text: str) -> bool:
    """Whether a cell starts with a number, or has none."""
    return re.match(r"(\*\*)?[-+]?\d", text) is not None or text in ("", MISSING)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

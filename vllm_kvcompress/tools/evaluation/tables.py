"""Cells as Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import exp

from vllm_kvcompress.tools.evaluation.cells import Cell, Difference
from vllm_kvcompress.tools.evaluation.panels import Panel, Row
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE
from vllm_kvcompress.tools.evaluation.stats import Estimate

PROTOCOL_NOTES = {
    AWARE: "the question is part of what is compressed",
    AGNOSTIC: "the context is compressed before the question is known",
}

MISSING = "\u2013"

BUDGET_NOTE = (
    "Budgets are tokens that a layer holds on average after the prefill, its window included, "
    "given as a number or as a share of the prompt and rounded up to whole blocks; the row *held* "
    "says what came of it."
)

INTERVAL_NOTE = (
    "In brackets the 95 % confidence interval: Wilson's for right or wrong answers, a bootstrap "
    "over the prompts of each task for all others. Means over tasks count every task alike."
)

BOLD_NOTE = (
    "Bold: the best of a column, where on the same prompts the interval of its difference to the "
    "next best leaves out 0."
)

FULL_NOTE = "The full cache has no budget; its figure is repeated in every column."


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


def held_text(panel: Panel, budget: str) -> str:
    """What rows hold at a budget: ``128 tokens, 12.6 %``, or from least to most."""
    cells = [cell for cell in panel.cells if cell.budget == budget]
    tokens = sorted(cell.kept_tokens for cell in cells)
    low, high = panel.shares(budget)
    held = _span(f"{tokens[0]:.0f}", f"{tokens[-1]:.0f}")
    return f"{held} tokens, {_span(per_cent(low), per_cent(high))} %"


def header(panel: Panel) -> str:
    """What the figures of a panel are, in a paragraph."""
    counts = sorted({cell.n for cell in panel.cells})
    prompts = f"{_span(str(counts[0]), str(counts[-1]))} prompt{'' if counts == [1] else 's'}"
    lengths = [cell.prompt_tokens for cell in panel.cells]
    tokens = _span(f"{min(lengths):.0f}", f"{max(lengths):.0f}")
    blocks = sorted({cell.block_size for cell in panel.cells if not cell.full})
    note = PROTOCOL_NOTES.get(panel.protocol, "")
    sentences = [
        f"Model {panel.model}, {panel.dtype}",
        f"Protocol {panel.protocol}{': ' if note else ''}{note}",
        f"{_count(len(panel.tasks), 'task')} of {panel.length} tokens (compressed: {tokens})",
        f"{prompts} a task, setting and budget, {seeds_text(panel.cells)}",
    ]
    if blocks:
        sentences.append(f"Blocks of {' and '.join(map(str, blocks))} tokens")
    if panel.likelihood:
        sentences.append("Nats per token and, as ppl, the exponential of their mean")
    sentences.append(f"Answered by {', '.join(sorted({cell.source for cell in panel.cells}))}")
    return ". ".join(sentences) + "."


def means(panel: Panel) -> str:
    """Settings by budgets: mean over the tasks in per cent, or nats per token."""
    what = "mean over tasks" if len(panel.tasks) > 1 else panel.tasks[0]
    head = [what, *map(budget_text, panel.budgets)]
    held = ["*held*", *(held_text(panel, budget) for budget in panel.budgets)]
    budgets = panel.budgets or ("",)
    if not panel.budgets:
        head, held = [what, "full cache"], []
    bold = {budget: _ahead(panel, budget) for budget in budgets}
    rows = [
        [panel.names[row], *(_mean(panel, row, budget, bold[budget]) for budget in budgets)]
        for row in panel.rows
    ]
    return table(head, [held, *rows] if held else rows)


def tasks(panel: Panel, budget: str) -> str:
    """Tasks by settings at one budget: scores in per cent, or nats per token.

    Of several full caches the one that others are compared with is shown; intervals of a single
    task are wide, so their ends have no decimals.
    """
    rows_of_budget = (row for row in (panel.full, *panel.compressed) if row is not None)
    shown = [row for row in rows_of_budget if panel.select(row, budget)]
    rows = []
    for task in panel.tasks:
        line = [task_name(task)]
        for row in shown:
            cell = next((c for c in panel.select(row, budget) if c.task == task), None)
            line.append(MISSING if cell is None else _cell(cell))
        rows.append(line)
    if len(panel.tasks) > 1:
        rows.append(["*mean*", *(_mean(panel, row, budget, None) for row in shown)])
    return table([f"task, {budget_text(budget)}", *(panel.names[row] for row in shown)], rows)


def differences(panel: Panel, reference: Row, rows: Sequence[Row] | None = None) -> str:
    """Settings by budgets: paired difference to a setting, in points or in nats per token.

    Args:
        panel: The cells.
        reference: One of the panel's rows; at the same budget, or the full cache.
        rows: Which to show; None: all that are compressed.

    """
    found: dict[Row, list[Difference | None]] = {}
    for row in rows or panel.compressed:
        if row == reference:
            continue
        line = [panel.difference(row, budget, reference) for budget in panel.budgets]
        if any(line):
            found[row] = line
    counts = {difference.pairs for line in found.values() for difference in line if difference}
    head = f"minus {panel.names[reference]}"
    if len(counts) == 1:
        head += f", {_count(counts.pop(), 'pair')}"
    lines = [
        [panel.names[row], *(_difference(panel, d, pairs=bool(counts)) for d in line)]
        for row, line in found.items()
    ]
    return table([head, *map(budget_text, panel.budgets)], lines)


def seeds_text(cells: Iterable[Cell]) -> str:
    """The seeds of some cells, such as ``seeds 0 to 4``."""
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _difference(panel: Panel, difference: Difference | None, *, pairs: bool) -> str:
    if difference is None:
        return MISSING
    estimate = difference.estimate
    text = signed(estimate, 1, 3) if panel.likelihood else signed(estimate)
    return f"{text}, {_count(difference.pairs, 'pair')}" if pairs else text


def _ahead(panel: Panel, budget: str) -> Row | None:
    """The compressed row that is better than the next one by more than the interval."""
    sign = -1 if panel.likelihood else 1
    found = [
        (sign * mean.value, row)
        for row in panel.compressed
        if (mean := panel.mean(row, budget)) is not None
    ]
    if len(found) < 2:
        return None
    (_, best), (_, second), *_ = sorted(found, key=lambda item: -item[0])
    difference = panel.difference(best, budget, second)
    if difference is None:
        return None
    low, high = difference.estimate.low, difference.estimate.high
    return best if (high < 0 if panel.likelihood else low > 0) else None


def _mean(panel: Panel, row: Row, budget: str, bold: Row | None) -> str:
    estimate = panel.mean(row, budget)
    if estimate is None:
        count = len(panel.select(row, budget))
        return f"{count} of {len(panel.tasks)} tasks" if count else MISSING
    text = _nats(estimate) if panel.likelihood else interval(estimate)
    value, _, rest = text.partition(" ")
    return f"**{value}** {rest}" if row == bold else text


def _cell(cell: Cell) -> str:
    if cell.score is not None:
        return interval(cell.score, 0)
    assert cell.nll is not None  # a cell has either
    return _nats(cell.nll)


def _nats(estimate: Estimate) -> str:
    value, low, high = (f"{end:.3f}" for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}], ppl {exp(estimate.value):.2f}"


def _round(value: float, digits: int) -> float:
    """Rounded, what arithmetic left in the last digits first, and never minus zero."""
    return round(round(value, 9), digits) + 0.0


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _count(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _is_number(text: str) -> bool:
    """Whether a cell starts with a number, or has none."""
    return re.match(r"(\*\*)?[-+]?\d", text) is not None or text in ("", MISSING)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""docs/compatibility.md as rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKS, REFUSED, UNTESTED = "✅", "❌", "⬜"


@dataclass(frozen=True)
class Row:
    """One line of the page's tables."""

    feature: str
    state: str
    evidence: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """File and name of every test that is named."""
        return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", self.evidence)

    @property
    def quote(self) -> str:
        """What the evidence begins with, if that is in backticks."""
        found = re.match(r"`([^`]+)`", self.evidence)
        return found[1] if found else ""


def rows() -> list[Row]:
    cells = [row for head, row in _cells() if head[0] == "feature"]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return [Row(*row) for row in cells]


def backend_table() -> list[list[str]]:
    """The table of attention backends by GPU, its head first."""
    found = [(head, row) for head, row in _cells() if head[0] == "layer"]
    return [found[0][0], *(row for _, row in found)] if found else []


def family_table() -> dict[str, tuple[str, str]]:
    """Family -> its state, and the quoted sentence if it is not served."""
    found = [row for head, row in _cells() if head[0] == "family"]
    return {family: (state, said.strip("`")) for family, _, state, said in found}


def write_family_table(lines: list[tuple[str, str, str, str]]) -> None:
    """Replace the page's table of families.

    Args:
        lines: Per family its name, ``model_type``, state and what is said.

    """
    path = ROOT / "docs" / "compatibility.md"
    text = path.read_text(encoding="utf-8")
    head = "| family | `model_type` | state | what is said |\n| --- | --- | --- | --- |\n"
    start = text.index(head) + len(head)
    end = start
    while text.startswith("|", end):
        end = text.index("\n", end) + 1
    cells = [(n, f"`{kind}`", state, f"`{said}`" if said else "") for n, kind, state, said in lines]
    table = "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in cells)
    path.write_text(text[:start] + table + text[end:], encoding="utf-8")


def _cells() -> Iterator[tuple[list[str], list[str]]]:
    """The cells of each line of a table, after those of the table's head."""
    head: list[str] = []
    for line in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
        elif not line.startswith("| --- |"):
            row = [cell.strip() for cell in line.strip("|").split("|")]
            if head:
                yield head, row
            else:
                head = row


def refusals() -> dict[str, str]:
    """Refused feature -> the sentence that the page quotes."""
    return {row.feature: row.quote for row in rows() if row.state == REFUSED}

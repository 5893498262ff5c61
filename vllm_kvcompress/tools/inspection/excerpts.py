"""Passages of the prompt in a picture, every token on a ground as strong as it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich.cells import get_character_cell_size

from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Passage, Run, passages
from vllm_kvcompress.tools.inspection.style import MARK, one_line, strongest

FONT_SIZE = 8.0
LINE_HEIGHT = 0.165
"""Inches."""
# Advance of DejaVu Sans Mono, the font that matplotlib brings along: 1233 of 2048 units.
CHARACTER_WIDTH = FONT_SIZE * 1233 / 2048 / 72
LINES = 3
"""Lines of a passage, about."""

# Tried in this order for characters that DejaVu lacks, where they are installed.
_OTHER_FONTS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Arial Unicode MS",
)
_MISSING = "\u25a1"


@dataclass(frozen=True)
class Glyph:
    """A character of a passage and the share of layers x heads that keep its token."""

    text: str
    share: float
    token: int

    @property
    def cells(self) -> int:
        """Columns it takes: two for the wide characters of East Asia, none for an accent."""
        return get_character_cell_size(self.text)


def pick(inspection: Inspection, run: Run, *, columns: int, count: int) -> list[Passage]:
    """The best-kept passages of about :data:`LINES` lines of ``columns`` characters each."""
    characters = sum(len(piece) for piece in inspection.pieces)
    length = max(1, round(0.9 * LINES * columns * inspection.prompt_len / max(characters, 1)))
    # A share of the prompt at most: of a short one, passages would otherwise be all there is.
    length = min(length, max(1, inspection.prompt_len // (2 * count)))
    margin = min(4, inspection.prompt_len // 8)
    return passages(run, inspection.pieces, length=length, count=count, margin=margin)


def layout(glyphs: Sequence[Glyph], columns: int) -> list[list[Glyph]]:
    """Break into lines of at most ``columns`` cells, after a space where there is one."""
    lines: list[list[Glyph]] = []
    line: list[Glyph] = []
    for glyph in glyphs:
        if sum(g.cells for g in line) + glyph.cells > columns:
            spaces = [i for i, g in enumerate(line) if g.text == " "]
            cut = spaces[-1] + 1 if spaces and spaces[-1] > columns // 2 else len(line)
            lines.append(line[:cut])
            line = line[cut:]
        line.append(glyph)
    return [*lines, line] if line else lines


def glyphs_of(inspection: Inspection, run: Run, passage: Passage) -> list[Glyph]:
    """The characters of a passage; what no font here can draw becomes a box."""
    found = [
        Glyph(c if _drawable(c) else _MISSING, float(run.token_share[token]), token)
        for token in range(passage.start, passage.stop)
        for c in one_line(inspection.pieces[token])
    ]
    while found and found[0].text == " ":
        found.pop(0)
    return found


def draw(axes: Axes, inspection: Inspection, run: Run, chosen: Sequence[Passage]) -> None:
    """Write passages below each other; one unit of the axes is a character and a line."""
    columns, rows = int(axes.get_xlim()[1]), axes.get_ylim()[0]
    family = [font_manager.FontProperties(fname=str(path)).get_name() for path in _fonts()]
    row = 0.0
    for passage in chosen:
        lines = layout(glyphs_of(inspection, run, passage), columns)[: LINES + 1]
        if row + 1 + len(lines) > rows:
            break
        axes.text(
            0,
            row + 0.5,
            f"positions {passage.start} to {passage.stop - 1}: a token is kept by "
            f"{passage.share:.0%} of layers \u00d7 KV heads on average",
            fontsize=FONT_SIZE,
            color="0.35",
            va="center",
        )
        for number, line in enumerate(lines, start=1):
            _draw_line(axes, line, row + number, family, strongest(inspection))
        row += len(lines) + 1.6


def height(count: int) -> float:
    """Inches that ``count`` passages take."""
    return count * (LINES + 1 + 1.6) * LINE_HEIGHT


def _draw_line(
    axes: Axes, line: Sequence[Glyph], row: float, family: list[str], highest: float
) -> None:
    column = 0
    for _, group in groupby(line, lambda glyph: glyph.token):
        part = list(group)
        cells = sum(glyph.cells for glyph in part)
        ground = Rectangle(
            (column, row),
            cells,
            0.94,
            facecolor=MARK,
            alpha=min(1.0, part[0].share / highest),
            edgecolor="none",
        )
        axes.add_patch(ground)
        axes.text(
            column,
            row + 0.5,
            "".join(glyph.text for glyph in part),
            fontsize=FONT_SIZE,
            family=family,
            va="center_baseline",
            parse_math=False,
        )
        column += cells


@cache
def _fonts() -> tuple[Path, ...]:
    """DejaVu Sans Mono and whatever else is there for the characters it lacks."""
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    own = font_manager.findfont("DejaVu Sans Mono")
    return (Path(own), *(Path(installed[n]) for n in _OTHER_FONTS if n in installed))


@cache
def _drawable(character: str) -> bool:
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in _fonts())

"""The picture of ``kvcompress inspect``: its size, its colours, and room for every label."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.figures import check_labels
from tests.support.inspections import inspection
from vllm_kvcompress.tools.inspection import excerpts, png_picture
from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Run, passages

SIZES = [
    (tokens, layers, methods)
    for tokens, layers in ((500, 3), (8000, 24), (500, 32), (8000, 80))
    for methods in (1, 3)
]


@pytest.mark.parametrize(("tokens", "layers", "methods"), SIZES)
def test_no_label_covers_another_or_is_cut_off(tokens: int, layers: int, methods: int) -> None:
    drawn = inspection(tokens, layers, methods, model="a-" * 40, question="Why? " * 200)
    figure = png_picture._draw(drawn)
    # Tokens of the excerpts touch each other; everything else has room.
    check_labels(figure, 20, {text for ax in figure.axes for text in ax.texts})
    for ax in figure.axes:
        for text in ax.texts:
            box, inside = text.get_window_extent(), ax.get_window_extent()
            assert box.x1 <= inside.x1 + 3, text.get_text()
            assert box.y0 >= inside.y0 - 3, text.get_text()


# The size is the sum of the inches in png_picture.py, at 120 pixels each.
@pytest.mark.parametrize(
    ("layers", "methods", "size"), [(3, 1, (1726, 963)), (24, 3, (2798, 1222))]
)
def test_picture_has_the_size_of_its_parts(
    tmp_path: Path, layers: int, methods: int, size: tuple[int, int]
) -> None:
    drawn = inspection(600, layers, methods)
    png_picture.save_picture(drawn, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == size
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    found = {color for _, color in colors}
    # The ends of the scale of shares, the bars and the mean.
    for wanted in ((253, 231, 37), (68, 1, 84), (0, 114, 178), (213, 94, 0)):
        assert min(max(map(abs, np.subtract(wanted, color))) for color in found) <= 6, wanted


def test_lines_of_an_excerpt_break_at_spaces_and_count_wide_characters() -> None:
    whole = Run("a", 1, "x", 3, 1, 1, (np.arange(3)[None],), (), None)
    text = Inspection("m", 3, np.arange(3), ("aaa bbb", "\u4f60\u597d", "e\u0301"), (whole,))
    glyphs = excerpts.glyphs_of(text, whole, passages(whole, text.pieces, length=2, count=1)[0])
    lines = excerpts.layout(glyphs, 5)
    assert "".join(g.text for g in lines[0]) == "aaa "
    assert all(sum(g.cells for g in line) <= 5 for line in lines)
    assert [g.cells for g in glyphs[-2:]] == [2, 2] or glyphs[-1].text == "\u25a1"
    assert [g.token for g in glyphs] == [0] * 7 + [1] * 2

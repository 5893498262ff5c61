"""Whether the labels of a matplotlib figure can be read."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text


def check_labels(
    figure: Figure,
    least: int,
    ignored: AbstractSet[Text] = frozenset(),
    may_overlap: Callable[[str, str], bool] = lambda one, other: False,
) -> None:
    """Check that no label is cut off and none covers another.

    Args:
        figure: The figure; it is drawn.
        least: The figure has more labels than this.
        ignored: Texts that are not looked at.
        may_overlap: Whether two texts may cover each other.

    """
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    beyond = _beyond(figure)
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text() and text not in beyond | ignored
    ]
    assert len(boxes) > least
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= width, label
        assert box.y1 <= height, label
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart or may_overlap(one, other), (one, other)


def _beyond(figure: Figure) -> set[Text]:
    """Labels of ticks beyond their axes, which matplotlib keeps and does not draw."""
    found: set[Text] = set()
    for axes in (one for ax in figure.axes for one in (ax, *ax.child_axes)):
        for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.majorTicks, *axis.minorTicks):
                for text in (tick.label1, tick.label2):
                    if not low <= text.get_position()[place] <= high:
                        found.add(text)
    return found

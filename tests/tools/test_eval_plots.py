"""Pictures of cells: their axes, lines and labels, and that no label covers another."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from tests.support.eval_records import KVPRESS, answers, full, measured, needle_grid, small_run
from tests.support.figures import check_labels
from vllm_kvcompress.tools.evaluation import plots
from vllm_kvcompress.tools.evaluation.record import Record
from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, make_groups
from vllm_kvcompress.tools.evaluation.results_frame import make_frame
from vllm_kvcompress.tools.evaluation.styles import styles_for
from vllm_kvcompress.tools.inspection.png_file import save_png

PNG = b"\x89PNG\r\n\x1a\n"


def groups(records: list[Record]) -> list[ResultGroup]:
    return make_groups(make_frame(records))


def share_figure(shown: list[ResultGroup]) -> Figure:
    return plots.share_figure(shown, styles_for(shown))


def task_figure(group: ResultGroup) -> Figure:
    return plots.task_figure(group, "0.125", styles_for([group]))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines_with_bars(axes: Axes) -> int:
    return sum(type(container).__name__ == "ErrorbarContainer" for container in axes.containers)


def likelihood_run() -> list[Record]:
    cut = {"budget": "0.5", "kept_tokens": 512}
    return [
        *measured([2.0, 3.0], label="full", method="none", budget="", kept_tokens=1000),
        *measured([2.2, 3.1]),
        *measured([2.1, 3.0], **cut),
        *measured([2.4, 3.5], label="random", method="random"),
        *measured([2.2, 3.2], label="random", method="random", **cut),
    ]


def test_share_figure(tmp_path: Path) -> None:
    figure = share_figure(groups(small_run()))
    assert [ax.get_title() for ax in figure.axes] == [
        "1024 tokens, 2 tasks",
        "2048 tokens, 2 tasks",
    ]
    assert [lines_with_bars(ax) for ax in figure.axes] == [4, 4]
    assert legend(figure) == ["full", "cake", "random", "snapkv", "snapkv (kvpress)"]
    cake = figure.axes[0].containers[0]
    middle = cake[0].get_ydata()
    assert list(middle) == [62.5, 62.5]
    dashed = figure.axes[0].lines[-1]
    assert np.unique(dashed.get_ydata()) == [87.5]
    assert dashed.get_linestyle() == "--"
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["12.8 %", "25.6 %"]
    path = tmp_path / "new" / "share.png"
    save_png(figure, path)
    assert path.read_bytes().startswith(PNG)
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_task_figure() -> None:
    group = groups(small_run())[0]
    (axes,) = (figure := task_figure(group)).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cwe", "vt"]
    assert len(axes.patches) == 4 * 2
    assert [round(bar.get_height(), 1) for bar in axes.patches[:2]] == [62.5, 62.5]  # type: ignore[attr-defined]
    assert legend(figure) == ["full", "cake", "random", "snapkv", "snapkv (kvpress)"]


def test_a_setting_without_a_mean_is_not_in_the_legend() -> None:
    records = [one for task in ("vt", "cwe") for one in answers([1, 0], task=f"ruler/{task}")]
    records += answers([1, 1], task="ruler/cwe", label="keydiff")
    shown = groups(records)
    assert legend(share_figure(shown)) == ["cake"]
    assert legend(task_figure(shown[0])) == ["cake", "keydiff", "not measured"]


def test_not_measured_and_zero_do_not_look_alike() -> None:
    records = [one for task in ("vt", "cwe") for one in answers([1, 0], task=f"ruler/{task}")]
    records += answers([0, 0], task="ruler/cwe", label="keydiff")
    (axes,) = task_figure(groups(records)[0]).axes
    names = [text.get_text() for text in axes.get_xticklabels()]
    (marks,) = (line for line in axes.lines if line.get_label() == plots.NOT_MEASURED)
    (cross,) = np.asarray(marks.get_xdata(), dtype=np.float64)
    assert names[round(cross)] == "vt"
    # A zero stands where its bar would be: a flat line of the bar's width and colour.
    feet = {}
    for one in axes.collections:
        for path in one.get_paths() if isinstance(one, LineCollection) else ():
            ends = np.asarray(path.vertices, dtype=np.float64)[:, 0]
            if np.ptp(ends) > 0:  # else the error of a bar
                feet[round(float(ends.mean()), 6)] = np.asarray(one.get_edgecolor())[0]
    assert len(feet) == 3
    assert round(float(cross), 6) not in feet
    (zero,) = (bar for bar in axes.patches if bar.get_height() == 0)  # type: ignore[attr-defined]
    middle = round(zero.get_x() + zero.get_width() / 2, 6)  # type: ignore[attr-defined]
    assert np.array_equal(feet[middle], np.asarray(zero.get_facecolor()))


def test_many_tasks_break_into_several_rows() -> None:
    records = [
        one
        for task in range(13)
        for label in ("cake", "dynamickv", "snapkv", "uniform", "h2o", "tova", "random")
        for one in answers([1, 0], task=f"ruler/task_{task:02}", label=label)
    ]
    figure = task_figure(groups(records)[0])
    assert [len(ax.get_xticklabels()) for ax in figure.axes] == [7, 6]


def test_likelihoods_with_perplexities_beside_them() -> None:
    figure = share_figure(groups(likelihood_run()))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "nats per token"
    assert [child.get_ylabel() for child in axes.child_axes] == ["perplexity"]
    bars = axes.containers[0]
    _, _, (segments,) = bars
    # At 0.125 CAKE has 0.2 and 0.1 nats more than the full cache: the mean is 2.65, and resamples
    # of two differences lie between 0.05 below and 0.05 above it.
    low, high = segments.get_segments()[1][:, 1]
    assert (low, high) == (pytest.approx(2.6), pytest.approx(2.7))


def test_needle_figure() -> None:
    figure = plots.needle_figure(groups(needle_grid()), "0.125")
    assert [ax.get_title() for ax in figure.axes[:2]] == ["full", "cake"]
    assert len(figure.axes) == 3  # and the colours
    shown = figure.axes[1].images[0].get_array()
    assert shown is not None
    # Depths 0, 50, 100 down, lengths across; of the two prompts at depth 0 the first is found.
    assert shown.tolist() == [[50, 50], [0, 0], [100, 100]]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["1k", "2k"]


def test_fields_without_prompts_are_empty() -> None:
    records = [r for r in needle_grid() if (r.length, r.labels["depth"]) != (2048, 50)]
    figure = plots.needle_figure(groups(records), "0.125")
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    assert np.isnan(np.ma.filled(shown, np.nan)[1, 1])


def test_looks_tell_settings_apart() -> None:
    labels = [f"method {number}" for number in range(12)]
    labels += ["method 0, this", "method 0, that", "method 11, this"]
    records = [one for label in labels for one in answers([1], label=label)]
    styles = styles_for(groups([*records, *answers([1], label=labels[0], source=KVPRESS)]))
    assert len(styles) == 16
    assert len({(style.color, style.marker, style.hollow) for style in styles.values()}) == 16
    first, *_, theirs = styles.values()
    assert (first.color, first.marker) == (theirs.color, theirs.marker)
    assert (first.hollow, theirs.hollow) == (False, True)


def test_variants_of_a_setting_share_its_colour() -> None:
    records = list(answers([1], label="cake")) + list(answers([1], label="cake, faithful"))
    records += list(answers([1], label="snapkv", source=KVPRESS))
    cake, faithful, theirs = styles_for(groups(records)).values()
    assert cake.color == faithful.color != theirs.color
    assert cake.marker != faithful.marker
    assert (cake.hatch, faithful.hatch, theirs.hatch) == (None, "xx", "////")


def crowded() -> list[Record]:
    records: list[Record] = []
    for length in (1024, 2048, 4096, 8192):
        for task in ("niah_multikey_1", "niah_multivalue", "vt", "cwe", "fwe", "qa_1", "qa_2"):
            where = {"length": length, "task": f"ruler/{task}", "prompt_tokens": length}
            records += full([1, 0], **{**where, "kept_tokens": length})
            for label in ("cake, faithful, gamma 5", *"abcdefgh"):
                for budget in ("0.5", "0.25", "0.125", "0.069"):
                    cut = {**where, "budget": budget, "kept_tokens": int(length * float(budget))}
                    records += answers([1, 0], label=label, **cut)
    return records


@pytest.mark.parametrize("kind", ["one", "four", "tasks", "nll", "needles"])
def test_no_label_covers_another_or_is_cut_off(kind: str) -> None:
    shown = groups(crowded())
    figure = {
        "one": lambda: share_figure(shown[:1]),
        "four": lambda: share_figure(shown),
        "tasks": lambda: task_figure(shown[0]),
        "nll": lambda: share_figure(groups(likelihood_run())),
        "needles": lambda: plots.needle_figure(groups(needle_grid()), "0.125"),
    }[kind]()
    # Boxes of slanted labels overlap where the labels do not.
    check_labels(figure, 10, may_overlap=lambda one, other: kind == "tasks" and "_" in one + other)

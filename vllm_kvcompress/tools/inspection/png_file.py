"""Figures as PNG files."""

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

DPI = 120


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure with a palette of 256 colours.

    The palette cannot be told from the original colours here, and takes a third of the space.

    Raises:
        OSError: The file cannot be written.

    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(drawn) as image:
        palette = image.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    palette.save(path, format="PNG", optimize=True)

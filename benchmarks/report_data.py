"""The committed files that docs/results.md is written from."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_kvcompress.tools.evaluation.cells import Cell, make_cells
from vllm_kvcompress.tools.evaluation.packed import read_notes, unpack
from vllm_kvcompress.tools.evaluation.panels import Panel, make_panels
from vllm_kvcompress.tools.evaluation.record import Record

QUALITY = "quality"
ABLATION = "ablation"
SPEED = ("engine", "capacity", "bench")


@dataclass(frozen=True)
class Packed:
    """A packed file.

    Attributes:
        name: Of the file, without its ending.
        notes: At its head: ``command`` and ``versions``; for ablations ``about``, a sentence, and
            ``reference``, the label that the others are compared with.
        records: What it holds.

    """

    name: str
    notes: Mapping[str, str]
    records: Sequence[Record]

    @cached_property
    def panels(self) -> list[Panel]:
        """Of this file alone."""
        return make_panels(make_cells(self.records))


@dataclass(frozen=True)
class Speed:
    """A file of measured times, as its benchmark wrote it.

    Attributes:
        name: Of the file, without its ending.
        rows: By column.

    """

    name: str
    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Results:
    """Everything that is committed.

    Attributes:
        quality: Files of all sections but that on ablations, by name.
        ablations: Files of that one, by name.
        speed: In the order of :data:`SPEED`.

    """

    quality: Sequence[Packed]
    ablations: Sequence[Packed]
    speed: Sequence[Speed]

    @cached_property
    def cells(self) -> list[Cell]:
        """Of :attr:`quality`, files of the same setting summed."""
        return make_cells(record for packed in self.quality for record in packed.records)

    @cached_property
    def panels(self) -> list[Panel]:
        """Of :attr:`quality`."""
        return make_panels(self.cells)


def read_results(folder: Path) -> Results:
    """Read benchmarks/results or a folder like it; what is not there is left out.

    Raises:
        EvaluationError: A packed file is none.

    """
    packed = [
        Packed(path.stem, read_notes(path), unpack(path))
        for path in sorted((folder / QUALITY).glob("*.csv"))
    ]
    speed = [
        Speed(path.stem, _read_rows(path))
        for prefix in SPEED
        for path in sorted(folder.glob(f"{prefix}*.csv"))
    ]
    return Results(
        [file for file in packed if not file.name.startswith(ABLATION)],
        [file for file in packed if file.name.startswith(ABLATION)],
        [file for file in speed if file.rows],
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

"""The committed files that docs/results.md is written from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from vllm_kvcompress.tools.evaluation.packed_results import read_notes, unpack
from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, make_groups
from vllm_kvcompress.tools.evaluation.results_frame import check_frame, make_frame

QUALITY = "quality"
ABLATION = "ablation"
SPEED = ("engine", "capacity", "cpu-cuts", "bench")


@dataclass(frozen=True)
class PackedFile:
    """A packed file.

    Attributes:
        name: Name of the file, without its ending.
        notes: Notes at its head: ``command`` and ``versions``; for ablations also ``about``, a
            sentence, and ``reference``, the label that the others are compared with.
        frame: Its records, as :func:`.results_frame.make_frame` makes it.

    """

    name: str
    notes: Mapping[str, str]
    frame: pd.DataFrame


@dataclass(frozen=True)
class Results:
    """Everything that is committed.

    Attributes:
        quality: Packed files of all sections but the one on ablations, by name.
        ablations: Packed files of the section on ablations, by name.
        speed: Rows of the files of measured times, by the name of the file; in the order of
            :data:`SPEED`.

    """

    quality: Sequence[PackedFile]
    ablations: Sequence[PackedFile]
    speed: Mapping[str, Sequence[Mapping[str, str]]]

    @cached_property
    def groups(self) -> list[ResultGroup]:
        """Groups of :attr:`quality`, records of the same setting in several files put together."""
        if not self.quality:
            return []
        frame = pd.concat([file.frame for file in self.quality], ignore_index=True)
        check_frame(frame)
        return make_groups(frame)


def read_results(folder: Path) -> Results:
    """Read benchmarks/results or a folder like it; files that do not exist are left out.

    Raises:
        EvaluationError: A file is not a packed file.

    """
    paths = sorted((folder / QUALITY).glob("*.csv"))
    speed = {
        path.stem: pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        for prefix in SPEED
        for path in sorted(folder.glob(f"{prefix}*.csv"))
    }
    return Results(
        _packed(path for path in paths if not path.name.startswith(ABLATION)),
        _packed(path for path in paths if path.name.startswith(ABLATION)),
        {name: rows for name, rows in speed.items() if rows},
    )


def _packed(paths: Iterable[Path]) -> list[PackedFile]:
    return [PackedFile(path.stem, read_notes(path), make_frame(unpack(path))) for path in paths]

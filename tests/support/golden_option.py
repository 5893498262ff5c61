"""The ``--golden-dir`` option: where outputs recorded from the released code are found."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--golden-dir``; without it ../shared/golden, or tests/golden if that is absent."""
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=SHARED if SHARED.is_dir() else ROOT / "tests" / "golden",
        metavar="DIR",
        help="folder of *.npz and *.json vectors recorded from the released code",
    )

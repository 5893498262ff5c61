"""Scoring's tiles fit the shared memory of GPUs that none of this needs to have."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shared", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_or_are_refused(itemsize: int, shared: int) -> None:
    """Whatever the window, if its queries leave room for keys."""
    scoring = pytest.importorskip("kvcompress_kernels.scoring_triton")
    for dim in (16, 64, 128, 256, 512):
        for window in (1, 2, 8, 31, 32, 33, 64, 128, 500):
            for group in (1, 4, 7, 71):
                if max(window, 16) * dim * itemsize > 0.45 * shared:
                    continue  # it may be refused
                tiles = scoring._tiles(group, window, dim, itemsize, shared)
                lines = tiles.heads * tiles.rows + tiles.stages * tiles.tokens
                assert lines * dim * itemsize <= shared - 2048
                assert tiles.rows >= window
                assert tiles.heads * tiles.rows >= 16
                if shared == 101376 and dim == 256 and window == 32:
                    assert lines * dim * itemsize < 0.85 * shared
    with pytest.raises(ValueError, match=r"a window of 500 queries of 512 x .* lower the window"):
        scoring._tiles(1, 500, 512, itemsize, shared)


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        pytest.param([512], [89], id="the largest heads, the least memory"),
        pytest.param([64, 96, 128, 256, 512], [80, 89, 90, 100, 120], marks=pytest.mark.slow),
    ],
)
def test_head_sizes_fit(sizes: list[int], targets: list[int]) -> None:
    """Compiled for each target by the installed Triton, in bf16 and fp32, for windows 1 and 32."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    numbers = [str(number) for number in sizes], [str(number) for number in targets]
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    ran = subprocess.run(
        [*command, "--check", *numbers[0], "--targets", *numbers[1]],
        cwd=REPO,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line for line in ran.stdout.splitlines() if re.search("row_sums|columns", line)]
    assert len(rows) == 2 * 2 * len(sizes)
    assert "-" not in {cell for row in rows for cell in row.split(" | ")}

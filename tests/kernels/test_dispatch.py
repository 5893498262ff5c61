"""Who runs, and what is said where Triton is missing."""

import subprocess
import sys
import textwrap

import pytest
import torch

from kvcompress_kernels.dispatch import use_triton


def test_tensors_on_the_cpu_stay_with_torch_unless_told_otherwise() -> None:
    tensor = torch.zeros(1)
    assert not use_triton(tensor, "auto")
    assert not use_triton(tensor, "torch")
    assert use_triton(tensor, "triton")
    assert use_triton(torch.zeros(1, device="meta"), "auto")
    with pytest.raises(ValueError, match=r'"auto", "triton" or "torch": \'cuda\''):
        use_triton(tensor, "cuda")  # type: ignore[arg-type]


WITHOUT_TRITON = textwrap.dedent(
    """
    import sys

    sys.modules["triton"] = None  # what an import finds where it is not installed

    import torch
    import kvcompress_kernels
    from kvcompress_kernels import compaction, page_tables, scoring, selection

    scores = torch.rand(1, 2, 50)
    kept = selection.select_tokens(scores, [7])
    assert kept.shape == (1, 2, 7)
    cache = torch.rand(4, 2, 16, 8)
    before = cache[0].clone()
    pages = torch.tensor([[0]]), torch.tensor([[3]])
    compaction.move_tokens(cache, pages[0], kept[:, :, :5] % 16, [5], pages[1])
    assert torch.equal(cache[0], before)
    try:
        selection.select_tokens(scores, [7], implementation="triton")
    except ImportError as error:
        print(error)
    """
)


def test_without_triton_the_twins_work_and_the_error_names_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kvcompress_kernels.selection need Triton" in done.stdout
    assert "pip install triton" in done.stdout

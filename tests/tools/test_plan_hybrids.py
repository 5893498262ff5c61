"""``kvcompress plan`` for models that mix sliding-window and full-attention layers, by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import folder, plan, refusal
from vllm_kvcompress.planning.layer_groups import LayerGroups

GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "sliding_window": 40,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
}
"""Changes that make a hybrid: two full-attention layers, and three groups of two others."""
PAGE = 2 * 2 * 16 * 16 * 2
"""Bytes of a page of 16 tokens."""


def test_figures_of_a_hybrid_by_hand(tmp_path: Path) -> None:
    words = "--device cpu --block-size 32 --max-num-batched-tokens 256 --context 1024 --output 48"
    model = folder(
        tmp_path, **GEMMA | {"head_dim": 32, "sliding_window": 80, "max_position_embeddings": 2048}
    )
    report = plan(model, *words.split(), "--budget", "128", memory="4MiB")
    plain, compressed = report.plain, report.compressed
    page = 4 * PAGE  # of 32 tokens, with heads of 32
    assert report.token_bytes == 8 * page / 32
    # A block is a page of each of the two layers of a group, in whichever of the four it is.
    assert plain.blocks == compressed.blocks == (4 << 20) // (2 * page) == 256
    # The other groups hold 79 tokens of the window and a step of 256, or one token, of 32 a block;
    # the window may begin anywhere in its first.
    read, held = 3 * (11 + 1), 3 * (3 + 1)
    assert (plain.after_prefill, plain.at_end, plain.peak) == (31 + held, 32 + held, 32 + read)
    assert plain.concurrency == 256 / (32 + read)
    assert plain.requests == 1 + (255 - 32 - read) // (32 + held)
    assert plain.least_memory == (32 + read + 1) * 2 * page
    # No cascade: all of the prompt and 4 blocks of survivors, then these and 2 of the answer.
    assert compressed.peak == 31 + 4 + read
    assert (compressed.after_prefill, compressed.at_end) == (4 + held, 6 + held)
    assert compressed.requests == 1 + (255 - 31 - 4 - read) // (6 + held)
    assert compressed.concurrency == 1 + (255 - 36 - read) / (4 + held)
    assert compressed.least_memory == (36 + read + 1) * 2 * page
    (note,) = report.notes
    assert note.startswith("Only the 2 full-attention layers of 8 are compressed.")
    assert f"up to {read} blocks of a request in 3 KV-cache groups" in note
    small = plan(model, *words.split(), "--budget", "128", memory=str(80 * 2 * page))
    assert small.plain.longest == (79 - read) * 32
    assert small.compressed.longest == (79 - read - 4) * 32


def test_a_block_has_as_many_pages_as_the_largest_group(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 4 + ["full_attention"] * 3
    model = folder(tmp_path, **GEMMA | {"num_hidden_layers": 7, "layer_types": types})
    report = plan(model, "--budget", "64")
    assert report.model.groups == LayerGroups(3, 1, 1, 40)
    assert report.model.compressed == (4, 5, 6)
    assert report.plain.blocks == (1 << 20) // (4 * PAGE)


def test_what_lies_beside_the_pool_counts_only_compressed_layers(tmp_path: Path) -> None:
    hybrid = plan(folder(tmp_path, **GEMMA)).beside
    # Without a cascade, whose tables take some more.
    full = ["--config", '{"prefill": "full"}']
    assert plan(folder(tmp_path, num_hidden_layers=2), *full).beside == hybrid


def test_a_hybrid_has_no_cascade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kv-cache-memory", "1MiB", "--config", '{"prefill": "cascade"}']
    said = refusal(capsys, ["plan", "--model", folder(tmp_path, **GEMMA), *words])
    assert "prefill cascade is not supported for models with sliding-window layers" in said

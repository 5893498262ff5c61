"""``kvcompress plan`` without an engine: figures by hand, JSON and what is printed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.e2e.harness import MODELS, SMALL
from tests.support.commands import folder, plan
from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.tools.cli import main
from vllm_kvcompress.tools.plan.figures import (
    Pool,
    SlidingWindows,
    Workload,
    compressed_figures,
    plain_figures,
)

TOKEN = 2 * 5 * 2 * 16
"""Elements of a token's keys and values."""


# --- figures -------------------------------------------------------------------------------------


def test_figures_of_the_small_model_by_hand() -> None:
    model = str(MODELS / SMALL / "config.json")
    words = "--device cpu --dtype float32 --block-size 32 --context 2048 --budget 256"
    report = plan(model, *words.split(), memory="256MiB")
    plain, compressed = report.plain, report.compressed
    # 30 layers, 3 KV heads of 64, keys and values of 4 bytes.
    assert report.token_bytes == 30 * 3 * 64 * 2 * 4 == 46080
    assert plain.blocks == compressed.blocks == 268435456 // (32 * 46080) == 182
    assert (plain.after_prefill, plain.at_end, plain.peak) == (1792 // 32, 64, 64)
    assert plain.concurrency == 182 / 64
    assert plain.requests == 181 // 64
    assert plain.longest == 181 * 32
    assert plain.least_memory == 65 * 32 * 46080
    # 8 blocks kept, 8 of the answer; while the prompt runs a thirtieth of its 56 or 64 blocks.
    assert (compressed.after_prefill, compressed.at_end, compressed.peak) == (8, 16, 16)
    assert compressed.requests == 1 + (181 - 16) // 16
    assert compressed.concurrency == 1 + (181 - (8 + 3)) / 8
    assert compressed.least_memory == 17 * 32 * 46080
    # Prompts beyond one step of 2048 tokens are held whole beside what is kept of them.
    assert compressed.longest == (181 - 8) * 32
    assert report.beside == 0


def test_figures_of_a_made_up_model_by_hand(tmp_path: Path) -> None:
    words = ["--budget", "64", "--output", "24", "--config", '{"prefill": "full"}']
    report = plan(folder(tmp_path), *words, memory="100KiB")
    # Blocks of 16 by default, and asynchronous scheduling: prompt, survivors and answer at once.
    assert report.token_bytes == 2 * TOKEN
    plain, compressed = report.plain, report.compressed
    assert plain.blocks == 102400 // (16 * 2 * TOKEN) == 10
    assert plain.peak == 1024 // 16
    assert not plain.starts
    assert not compressed.starts
    assert plain.requests == compressed.requests == 0
    assert plain.longest == 9 * 16
    assert compressed.peak == 63 + 4 + 2
    assert compressed.after_prefill == 4
    assert compressed.at_end == 4 + 2
    assert compressed.least_memory == (64 + 4 + 1 + 1) * 16 * 2 * TOKEN
    assert any(note.startswith("vLLM refuses to start") for note in report.notes)


def test_an_fp8_cache_has_twice_the_blocks(tmp_path: Path) -> None:
    model = folder(tmp_path)
    half = plan(model, "--budget", "64")
    fp8 = plan(model, "--budget", "64", "--kv-cache-dtype", "fp8")
    assert fp8.token_bytes * 2 == half.token_bytes
    assert fp8.plain.blocks in (2 * half.plain.blocks, 2 * half.plain.blocks + 1)
    assert ("--kv-cache-dtype", "fp8") in fp8.shared_flags


@pytest.mark.parametrize(
    ("changes", "words", "bytes_per_token"),
    [
        ({"torch_dtype": "float32"}, (), 2 * TOKEN),  # vLLM serves it in half precision
        ({"torch_dtype": None}, (), 2 * TOKEN),
        ({}, ("--dtype", "float"), 4 * TOKEN),
        ({"num_key_value_heads": None}, (), 2 * TOKEN * 2),
        ({"head_dim": None}, (), 2 * TOKEN),
    ],
)
def test_shape_and_dtype_follow_vllms_rules(
    changes: dict[str, Any], words: tuple[str, ...], bytes_per_token: int, tmp_path: Path
) -> None:
    assert plan(folder(tmp_path, **changes), *words).token_bytes == bytes_per_token


def test_the_longest_context_is_the_models(tmp_path: Path) -> None:
    assert plan(folder(tmp_path)).work.context == 1024
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert plan(folder(tmp_path, rope_parameters=linear)).work.context == 4096
    yarn = {**linear, "rope_type": "yarn", "original_max_position_embeddings": 256}
    assert plan(folder(tmp_path, rope_parameters=yarn)).work.context == 1024


# --- memory of a GPU -----------------------------------------------------------------------------


def parameters() -> int:
    attention = 64 * (4 + 2 + 2 + 4) * 16
    return 256 * 64 + 5 * (attention + 3 * 64 * 128 + 2 * 64) + 64


def test_weights_are_counted_from_the_structure(tmp_path: Path) -> None:
    report = plan(folder(tmp_path), "--gpu-memory", "2GiB", "--budget", "64")
    assert report.plain.memory == int((2 << 30) * 0.92) - 2 * parameters()
    assert report.compressed.memory == report.plain.memory - report.beside
    assert report.beside > 256 << 20
    assert f"{parameters():,} parameters of 2 bytes" in report.assumed[0]
    assert ("--gpu-memory-utilization", "0.92") in report.shared_flags


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_weights_on_disk_count_as_they_are_served(stored: str, tmp_path: Path) -> None:
    import numpy as np

    model = folder(tmp_path)
    tensors = {"a": np.zeros((100, 30), stored), "b": np.zeros(11, "int32")}
    save_file(tensors, tmp_path / "model.safetensors")
    report = plan(model, "--gpu-memory", "2GiB", "--gpu-memory-utilization", "0.5")
    weights = (1 << 30) - report.plain.memory
    assert 6000 + 44 < weights < 6000 + 44 + 200  # and the file's header
    assert "the safetensors files, served in bfloat16" in report.assumed[0]


def test_an_index_without_its_files_says_how_large_they_are(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "not-here.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = plan(folder(tmp_path), "--gpu-memory", "2GiB")
    assert report.plain.memory == int((2 << 30) * 0.92) - 12345


def test_steps_are_longer_on_a_large_gpu(tmp_path: Path) -> None:
    model = folder(tmp_path)
    for memory, tokens, requests in (("24GiB", 2048, 256), ("80GiB", 8192, 1024)):
        server = plan(model, "--gpu-memory", memory).server
        assert (server.max_num_batched_tokens, server.max_num_seqs) == (tokens, requests)
    server = plan(model, "--max-num-batched-tokens", "512", "--max-num-seqs", "7").server
    assert (server.max_num_batched_tokens, server.max_num_seqs) == (512, 7)


# --- what does not change, whatever the numbers --------------------------------------------------


@examples(max_examples=200, deadline=None)
@given(
    size=st.sampled_from([4, 16]),
    context=st.integers(60, 600),
    share=st.floats(0.05, 0.95),
    output=st.integers(1, 40),
    blocks=st.integers(1, 400),
    lag=st.sampled_from([0, 1]),
    one_step=st.sampled_from([64, 1000]),
    layers=st.sampled_from([LayerGroups(6), LayerGroups(6, 1, 2, 24)]),
)
def test_planned_figures_hang_together(
    size: int,
    context: int,
    share: float,
    output: int,
    blocks: int,
    lag: int,
    one_step: int,
    layers: LayerGroups,
) -> None:
    budget = max(int(share * context), 8 + size)
    config = KVCompressionConfig.parse({"method": "cake", "budget": budget, "window": 8})
    planner = BlockPlanner(
        config, size, EngineLimits(6, one_step, lag, alone=not layers.window_groups)
    )
    windows = SlidingWindows(layers, size, (1 + lag) * one_step, lag)
    work = Workload(context, output, longest=800)
    unit = 2 * 6 * 2 * 8 * size * 2

    def figures(number: int) -> Any:
        return compressed_figures(Pool(number * unit, unit, size), work, planner, windows)

    pool = Pool(blocks * unit + unit - 1, unit, size)
    plain, compressed = plain_figures(pool, work, windows), figures(blocks)
    assert plain.blocks == compressed.blocks == blocks
    assert compressed.after_prefill <= plain.after_prefill
    assert compressed.at_end <= plain.at_end + 1
    # Nothing is lost where no moment takes more than without compression.
    if compressed.peak <= plain.peak and compressed.least_memory <= plain.least_memory:
        assert compressed.requests >= plain.requests
    untouched = planner.prompt_cut(work.prompt) is None and planner.prompt_cut(context) is None
    if untouched and compressed.starts == plain.starts:
        assert compressed.requests == plain.requests
    # The least memory is just enough.
    least, rest = divmod(compressed.least_memory, unit)
    assert rest == 0
    assert figures(least).requests >= 1
    assert figures(least - 1).requests == 0
    # So is the longest context.
    longest = compressed.longest

    def needed(tokens: int) -> int:
        return planner.least_pool(tokens) + windows.reserved(tokens)

    assert longest == 0 or needed(longest) <= blocks - 1
    assert longest == 800 or needed(longest + 1) > blocks - 1
    assert compressed.starts == (context <= longest)


# --- notes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("--budget 1000 --output 100", "Will not pay: a prompt of 924 tokens fits"),
        ("--budget 900 --output 8", "Will hardly pay: a finished request holds"),
        ("--budget 64 --output 800", "Will hardly pay: a finished request holds"),
        ("--budget 64 --max-num-seqs 2", "Memory is ample: plain vLLM already holds 2"),
        ("--budget 64 --max-num-seqs 3", "A step runs at most 3 requests"),
        ("--budget 64 --max-num-batched-tokens 256", "A prompt of 768 tokens runs in several"),
        ("--method scatter", "Will not pay: scatter keeps every token"),
        ("--method none", "Method none compresses only the requests that ask"),
    ],
)
def test_a_plan_says_what_compression_gains(words: str, start: str, tmp_path: Path) -> None:
    report = plan(folder(tmp_path), *words.split(), memory="1400KiB")
    assert any(note.startswith(start) for note in report.notes), report.notes


def test_a_plan_with_much_to_gain_says_nothing(tmp_path: Path) -> None:
    report = plan(folder(tmp_path), "--budget", "64", "--output", "32")
    assert report.notes == []
    assert report.compressed.requests > 3 * report.plain.requests > 0


# --- output --------------------------------------------------------------------------------------


def test_json_has_every_figure_and_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--kv-cache-memory", "1MiB", "--budget", "0.25", "--config", '{"gamma": 200}']
    assert main(["plan", "--model", folder(tmp_path), *words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    report = plan(folder(tmp_path), *words[2:])
    assert value["plain"]["blocks"] == report.plain.blocks
    assert value["compressed"]["concurrency"] == report.compressed.concurrency
    assert value["model"]["kv_bytes_per_token"] == report.token_bytes
    assert value["request"] == {"context": 1024, "output": 256, "longest": 1024, "prompt": 768}
    assert value["kv_compression"] == {"method": "cake", "budget": 0.25, "gamma": 200}
    compressed = shlex.split(value["commands"]["compressed"])
    assert compressed[: len(shlex.split(value["commands"]["plain"]))] == shlex.split(
        value["commands"]["plain"]
    )
    assert json.loads(compressed[compressed.index("--kv-compression-config") + 1]) == {"gamma": 200}


def test_piped_output_fits_100_columns_and_can_be_pasted(tmp_path: Path) -> None:
    model = folder(tmp_path)
    words = ["--kv-cache-memory", "1MiB", "--budget", "64", "--max-num-batched-tokens", "256"]
    command = [sys.executable, "-m", "vllm_kvcompress.tools.cli", "plan", "--model", model, *words]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "40"}
    done = subprocess.run(command, env=env, capture_output=True, timeout=120, check=True)
    assert not done.stderr
    out = done.stdout.decode()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines if model not in line)
    row = next(line for line in lines if "requests at one time" in line)
    report = plan(model, *words[2:])
    assert [cell.strip() for cell in row.split("│")[2:4]] == [
        str(report.plain.requests),
        str(report.compressed.requests),
    ]
    pasted = out[out.index("Compressed\n") + len("Compressed\n") :].replace("\\\n", "")
    assert shlex.split(pasted) == report.commands()["compressed"]

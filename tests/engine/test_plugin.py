"""Flags and keyword arguments: what they become, and that nothing changes without them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress.engine.llm import LLM
from vllm_kvcompress.engine.plugin import merge_settings, register

FLAGS = ("--kv-compression", "--kv-compression-budget", "--kv-compression-config")


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def run(*command: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A fresh process, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "COLUMNS": "200"}
    return subprocess.run(
        list(map(str, command)), env=env, text=True, capture_output=True, timeout=timeout
    )


# --- registering ---------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    register()
    before = {
        name: EngineArgs.__dict__[name]
        for name in ("add_cli_args", "from_cli_args", "create_engine_config")
    }
    register()
    assert {name: EngineArgs.__dict__[name] for name in before} == before
    # Wrapping twice would offer each flag twice, which argparse refuses.
    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


OFF = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends import registry
from vllm.v1.engine.input_processor import InputProcessor
assert EngineArgs._kv_compression_wrapped, "the entry point was not loaded"
process_inputs = InputProcessor.process_inputs
config = EngineArgs(
    model=sys.argv[1], skip_tokenizer_init=True, load_format="dummy"
).create_engine_config()
assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
assert config.scheduler_config.scheduler_cls is None, config.scheduler_config.scheduler_cls
assert config.scheduler_config.get_scheduler_cls().__module__.startswith("vllm.v1.core.sched")
assert InputProcessor.process_inputs is process_inputs
cpu = registry.AttentionBackendEnum.CPU_ATTN
assert cpu.get_class().__name__ == "CPUAttentionBackend", cpu.get_class()
assert not registry._ATTN_OVERRIDES, registry._ATTN_OVERRIDES
from vllm.v1 import kv_cache_spec_registry as specs
specs.KVCacheSpecRegistry._ensure_registered()
names = [spec.__name__ for spec in specs._REGISTRY_KVCACHESPEC_LIST]
assert "FullAttentionSpec" in names and "ArenaSpec" not in names, names
loaded = sorted(m for m in sys.modules if m.startswith("vllm_kvcompress.engine."))
ours = [f"vllm_kvcompress.engine.{name}" for name in ("command_line", "hooks", "plugin")]
assert loaded == ours, loaded
print("off means off")
"""


def test_off_means_off(folder: Path) -> None:
    done = run(sys.executable, "-c", OFF, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "off means off" in done.stdout


def test_on_names_our_classes(folder: Path) -> None:
    register()
    extra = {"kv_compression": {"method": "cake", "budget": 256}}
    options: dict[str, Any] = {"skip_tokenizer_init": True, "load_format": "dummy"}
    arguments = EngineArgs(model=str(folder), additional_config=extra, **options)
    config = arguments.create_engine_config()
    # In this process compression is on for this configuration only.
    plain = EngineArgs(model=str(folder), **options).create_engine_config()
    assert (
        config.parallel_config.worker_cls
        == "vllm_kvcompress.engine.worker.cpu_worker.ArenaCPUWorker"
    )
    assert config.scheduler_config.get_scheduler_cls().__name__ == "ArenaScheduler"
    assert plain.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert plain.scheduler_config.scheduler_cls is None
    # Another cache content needs another hash, or compiled graphs would be shared.
    assert config.compute_hash() != plain.compute_hash()


@pytest.mark.parametrize("key", ["kv-compression", "kvcompression", "KV_Compresion"])
@pytest.mark.parametrize("beside", [{}, {"kv_compression": {"method": "cake"}}])
def test_a_near_miss_of_the_key_is_refused(folder: Path, key: str, beside: dict[str, Any]) -> None:
    register()
    extra = {**beside, key: {"method": "cake", "budget": 256}}
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, additional_config=extra)
    with pytest.raises(ValueError, match=f'additional_config has "{key}", .*"kv_compression": '):
        arguments.create_engine_config()


def test_keys_of_others_are_left_alone(folder: Path) -> None:
    register()
    extra = {"mine": 1, "kv_transfer": {}, "compression": {"level": 2}}
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, additional_config=extra)
    config = arguments.create_engine_config()
    assert config.additional_config == extra
    assert config.scheduler_config.scheduler_cls is None


# --- flags ---------------------------------------------------------------------------------------


def extra_of(parser: FlexibleArgumentParser, *arguments: str) -> Any:
    """additional_config as the engine gets it."""
    # Any folder that exists: this is about arguments, and nothing may be looked up.
    args = parser.parse_args(["--model", ".", *arguments])
    return AsyncEngineArgs.from_cli_args(args).additional_config


def test_without_flags_additional_config_is_untouched(parser: FlexibleArgumentParser) -> None:
    assert extra_of(parser) == EngineArgs(model=".").additional_config
    assert extra_of(parser, "--additional-config", '{"mine": 1}') == {"mine": 1}


def test_flags_become_settings(parser: FlexibleArgumentParser) -> None:
    assert extra_of(parser, "--kv-compression", "cake") == {
        "kv_compression": {"method": "cake", "budget": 1024}
    }
    arguments = ["--kv-compression-budget", "0.25", "--kv-compression-config", '{"gamma": 3}']
    assert extra_of(parser, *arguments, "--kv-compression", "cake") == {
        "kv_compression": {"method": "cake", "budget": 0.25, "gamma": 3}
    }


def test_vllms_dotted_form_of_json_arguments_works(parser: FlexibleArgumentParser) -> None:
    arguments = ["--kv-compression=cake", "--kv-compression-config.gamma", "3"]
    assert extra_of(parser, *arguments)["kv_compression"]["gamma"] == 3


def test_settings_of_additional_config_alone_pass_through(parser: FlexibleArgumentParser) -> None:
    given = '{"kv_compression": {"method": "uniform", "budget": 99}, "mine": 1}'
    assert extra_of(parser, "--additional-config", given) == json.loads(given)


@pytest.mark.parametrize("flags_first", [True, False])
def test_flags_and_additional_config_merge(
    parser: FlexibleArgumentParser, flags_first: bool
) -> None:
    flags = ["--kv-compression", "random", "--kv-compression-budget", "64"]
    other = ["--additional-config", '{"mine": {"deep": 1}}']
    assert extra_of(parser, *(flags + other if flags_first else other + flags)) == {
        "mine": {"deep": 1},
        "kv_compression": {"method": "random", "budget": 64},
    }


@pytest.mark.parametrize("flags_first", [True, False])
def test_the_setting_given_twice_is_refused(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], flags_first: bool
) -> None:
    flags = ["--kv-compression", "random"]
    other = ["--additional-config", '{"kv_compression": {"method": "cake"}}']
    with pytest.raises(SystemExit):
        extra_of(parser, *(flags + other if flags_first else other + flags))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: kv_compression is set twice; use either" in last


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-compression-budget", "64"],
        ["--kv-compression-config", '{"gamma": 3}'],
        ["--kv-compression-config", "{}"],
    ],
)
def test_settings_without_a_method_are_refused(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        extra_of(parser, *arguments)
    assert "need --kv-compression METHOD" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-compression-config", "{gamma: 3}"], "must be a JSON object, got '{gamma: 3}'"),
        (["--kv-compression-config", "[1]"], "must be a JSON object, got '[1]'"),
        (["--kv-compression-config", '"cake"'], "must be a JSON object, got"),
        (["--kv-compression-budget", "lots"], "a whole number of tokens per layer"),
        (["--kv-compression-budget=-3"], "got -3"),
    ],
)
def test_wrong_arguments_end_like_argparse_ends(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        extra_of(parser, "--kv-compression", "cake", *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error
    assert "error: argument --kv-compression" in error


def test_parsed_arguments_are_not_changed(parser: FlexibleArgumentParser) -> None:
    args = parser.parse_args(["--model", ".", "--kv-compression", "cake"])
    before = dict(vars(args))
    first = AsyncEngineArgs.from_cli_args(args)
    # A server may build its engine arguments from the same namespace again.
    second = AsyncEngineArgs.from_cli_args(args)
    assert first.additional_config == second.additional_config
    assert vars(args) == before


# --- refusals of a command -----------------------------------------------------------------------

COMMAND = ["--skip-tokenizer-init", "--load-format", "dummy", "--kv-compression", "cake"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tensor-parallel-size", "2"], "tensor or pipeline parallelism is not yet supported"),
        (["--kv-cache-dtype", "fp8"], "a quantized KV cache on the CPU is not supported"),
        (["--kv-compression-budget", "40"], "kv-compression-budget 40 is too small"),
    ],
)
def test_a_command_that_is_refused_ends_like_argparse_ends(
    parser: FlexibleArgumentParser,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    arguments = AsyncEngineArgs.from_cli_args(
        parser.parse_args(["--model", str(folder), *COMMAND, *words])
    )
    with pytest.raises(SystemExit) as caught:
        arguments.create_engine_config()
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f": error: {sentence}" in error


def test_a_command_that_makes_other_arguments_of_its_own_is_refused_alike(
    parser: FlexibleArgumentParser, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``vllm bench`` gives all that is in them to ``LLM``."""
    words = ["--model", str(folder), *COMMAND, "--kv-compression-budget", "40"]
    given = vars(AsyncEngineArgs.from_cli_args(parser.parse_args(words)))
    with pytest.raises(SystemExit) as caught:
        AsyncEngineArgs(**given).create_engine_config()
    assert caught.value.code == 2
    assert "kv-compression-budget 40 is too small" in capsys.readouterr().err


def test_without_flags_engine_arguments_are_as_without_the_plugin(
    parser: FlexibleArgumentParser,
) -> None:
    words = ["--model", ".", "--additional-config", '{"mine": 1}']
    made = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    assert vars(made).keys() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert type(made.additional_config) is dict


def test_a_program_that_is_refused_gets_the_error(folder: Path) -> None:
    extra = {"kv_compression": {"method": "cake"}}
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, additional_config=extra, tensor_parallel_size=2
    )
    with pytest.raises(ValueError, match="parallelism is not yet supported"):
        arguments.create_engine_config()


def test_vllm_serve_says_one_sentence(folder: Path) -> None:
    """The real command: one sentence, and no traceback."""
    script = Path(sys.executable).parent / "vllm"
    words = [*COMMAND, "--port", "0", "--kv-cache-dtype", "fp8", "--api-server-count", "2"]
    done = run(script, "serve", folder, *words)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    # Triton's compiler may have the last word as the process ends.
    said = [line for line in done.stderr.splitlines() if line.startswith("vllm: error: ")]
    assert len(said) == 1
    assert "a quantized KV cache on the CPU is not supported" in said[0]


# --- keyword arguments ---------------------------------------------------------------------------


def test_keyword_arguments_merge_like_flags() -> None:
    given = {"mine": 1}
    merged = merge_settings(given, "cake", 64, {"gamma": 3, "check_integrity": True})
    assert merged == {
        "mine": 1,
        "kv_compression": {"method": "cake", "budget": 64, "gamma": 3, "check_integrity": True},
    }
    assert given == {"mine": 1}
    assert merge_settings(None, None, None, None) == {}
    assert merge_settings(None, "cake", None, None)["kv_compression"]["budget"] == 1024
    assert merge_settings(merged, None, None, None) == merged


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None, None, 64, None), "need --kv-compression METHOD"),
        ((None, None, None, {"gamma": 3}), "need --kv-compression METHOD"),
        ((None, None, None, {}), "need --kv-compression METHOD"),
        (({"kv_compression": {"method": "cake"}}, None, 64, None), "need --kv-compression METHOD"),
        (({"kv_compression": {"method": "cake"}}, "cake", None, None), "set twice"),
        ((None, "snap", None, None), 'unknown method "snap"'),
        ((None, "cake", None, {"gama": 3}), 'unknown parameter "gama"'),
        ((None, "cake", "64", None), "got '64'"),
        ((None, "cake", None, {"budget": 64}), "budget does not belong in"),
    ],
)
def test_wrong_keyword_arguments_get_one_sentence(
    arguments: tuple[Any, Any, Any, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        merge_settings(*arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_llm_class_checks_before_anything_is_loaded(tmp_path: Path) -> None:
    # There is no model at all, so a later check could not give this answer.
    with pytest.raises(ValueError, match='unknown method "snap"'):
        LLM(str(tmp_path), kv_compression="snap")
    with pytest.raises(ValueError, match="need --kv-compression METHOD"):
        LLM(str(tmp_path), kv_compression_budget=64)


def test_the_llm_class_hands_settings_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("vllm.LLM.__init__", lambda self, model, **kwargs: seen.update(kwargs))
    LLM(
        "m",
        kv_compression="cake",
        kv_compression_budget=0.5,
        kv_compression_config={"gamma": 3},
        additional_config={"mine": 1},
        seed=4,
    )
    assert seen == {
        "seed": 4,
        "additional_config": {
            "mine": 1,
            "kv_compression": {"method": "cake", "budget": 0.5, "gamma": 3},
        },
    }


# --- the server's command line -------------------------------------------------------------------


def test_vllm_serve_documents_the_flags() -> None:
    script = Path(sys.executable).parent / "vllm"
    done = run(script, "serve", "--help=KVCompression")
    assert done.returncode == 0, done.stderr[-2000:]
    for flag in FLAGS:
        assert f"  {flag} " in done.stdout
    text = " ".join(done.stdout.split())
    for words in ("cake, dynamickv, snapkv", "window included", "JSON object"):
        assert words in text

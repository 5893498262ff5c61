"""``kvcompress doctor``, and the variables that it looks at."""

from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.platforms.interface import UnspecifiedPlatform

from tests.support.commands import LLAMA, folder, plan
from tests.support.fake_cuda import become_cuda
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.cli import main
from vllm_kvcompress.tools.doctor import environment
from vllm_kvcompress.tools.kv_space import check_kv_space


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of setup.py, as if this tree were installed with pip."""
    text = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    found = [
        EntryPoint(name, environment.ENTRY_POINT, environment.GROUP)
        for name in ("kvcompress", "vllm_kvcompress")
        if f'"{name} = {environment.ENTRY_POINT}"' in text
    ]
    set_points(monkeypatch, found)


def set_points(monkeypatch: pytest.MonkeyPatch, found: list[EntryPoint]) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: found)
    monkeypatch.setattr(environment, "entry_points", lambda **_: found)


def say(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit status, and the lines by what they are about."""
    status = main(["doctor"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert ("would not work" in last) == bool(status)
    return status, {line[6:16].strip(): f"{line[:4].strip()} {line[17:]}" for line in lines}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("allowed", "works"),
    [
        (None, True),
        ("kvcompress", True),
        ("vllm_kvcompress", True),
        ("other,kvcompress", True),
        ("other", False),
        ("", False),
    ],
)
def test_an_allow_list_that_leaves_us_out_is_named(
    allowed: str | None,
    works: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    status, lines = say(capsys)
    assert status == (0 if works else 1)
    plugin = lines.pop("plugin")
    assert plugin.startswith("ok loaded by vLLM as kvcompress or" if works else "FAIL not loaded")
    assert works or f"VLLM_PLUGINS={allowed!r} leaves it out" in plugin
    assert not any(line.startswith("FAIL") for line in lines.values())
    assert lines["vLLM"] == f"ok {vllm.__version__}, supported"
    assert lines["platform"].startswith("ok CPU")
    assert lines["attention"].startswith("ok CPU_ATTN")
    assert lines["kernels"] == "ok torch, on the CPU"


def test_a_package_that_is_only_on_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_points(monkeypatch, [])
    status, lines = say(capsys)
    assert status == 1
    assert lines["plugin"].startswith("FAIL vLLM does not see it")


@pytest.mark.usefixtures("installed")
def test_what_stops_a_server_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as other:
        other.setattr(vllm, "__version__", "0.31.2")
        status, lines = say(capsys)
    assert status == 1
    assert lines["vLLM"].startswith("FAIL vLLM 0.31.2 is not supported")
    with monkeypatch.context() as other:
        other.setattr("vllm.platforms._current_platform", UnspecifiedPlatform())
        status, lines = say(capsys)
    assert status == 1
    assert lines["platform"].startswith("FAIL vLLM finds no device")
    with monkeypatch.context() as other:
        other.setattr("kvcompress_kernels.selection.top_tokens", broken)
        status, lines = say(capsys)
    assert status == 1
    assert lines["kernels"] == "FAIL torch, on the CPU: RuntimeError: no such kernel"
    with monkeypatch.context() as gpu:
        become_cuda(gpu, (9, 0))
        gpu.setattr(environment, "_kernels", lambda _: environment.Finding("kernels", True, ""))
        gpu.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        status, lines = say(capsys)
    assert status == 1
    assert lines["attention"] == "ok FLASH_ATTN or TRITON_ATTN for half precision, heads of 128"
    assert lines["variable"].startswith("FAIL VLLM_USE_V2_MODEL_RUNNER=0")


def broken(*_: Any) -> None:
    raise RuntimeError("no such kernel")


# --- the variable that overrules the size of the KV cache ----------------------------------------


def test_a_size_that_vllm_would_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kv_space("--cache-mib")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    with pytest.raises(CommandError, match="VLLM_CPU_KVCACHE_SPACE=2 would overrule --cache-mib"):
        check_kv_space("--cache-mib")
    # On a GPU vLLM does not look at it.
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr("vllm.platforms._current_platform", gpu)
    check_kv_space("--cache-mib")


def test_eval_inspect_and_bench_refuse_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support.commands import SERVED, parsed
    from vllm_kvcompress.tools.bench.command import make_job
    from vllm_kvcompress.tools.evaluation.vllm_backend import VllmBackend
    from vllm_kvcompress.tools.inspection.run import InspectionJob, start

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    overrules = "VLLM_CPU_KVCACHE_SPACE=2 would overrule"
    with pytest.raises(CommandError, match=overrules):
        VllmBackend(
            "m",
            dtype="auto",
            block_size=32,
            max_model_len=64,
            cache_mib=8,
            plain=False,
            engine_args={},
        )
    with pytest.raises(CommandError, match=overrules):
        start(InspectionJob(tmp_path, "", "", False, (), 32, "auto", None, {}), SERVED, 64)
    words = ["bench", "--model", folder(tmp_path, head_dim=32), "--output", str(tmp_path / "b")]
    with pytest.raises(CommandError, match=overrules):
        make_job(parsed(words))


def test_plan_says_what_overrules_its_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = folder(tmp_path, head_dim=32)
    words = ["--device", "cpu", "--budget", "256"]
    assert not any("KVCACHE" in sentence for sentence in plan(model, *words).assumed)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    (said,) = [s for s in plan(model, *words).assumed if "KVCACHE" in s]
    assert said.startswith("VLLM_CPU_KVCACHE_SPACE=2 is set here")
    assert LLAMA["head_dim"] == 16
    assert not any("KVCACHE" in s for s in plan(model).assumed)  # a GPU's server

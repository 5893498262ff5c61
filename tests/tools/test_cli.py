"""The command ``kvcompress``: sub-commands, and how a user's error looks."""

import argparse
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import MODELS, REPO, SMALL
from tests.support.commands import refusal
from vllm_kvcompress import __version__
from vllm_kvcompress.tools import cli
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.byte_sizes import format_bytes, parse_bytes
from vllm_kvcompress.tools.plan import command as plan


def test_every_command_is_listed_with_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in cli.COMMANDS:
        assert any(words[:1] == [name] and len(words) > 3 for words in lines)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kvcompress {__version__}\n"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "kvcompress: the following arguments are required: COMMAND"),
        (["tidy"], "kvcompress: argument COMMAND: invalid choice: 'tidy'"),
        (["plan", "--mode", "x"], "kvcompress plan: "),
        (
            ["plan", "--model", "x", "--kv-cache-memory", "3 elephants"],
            "kvcompress plan: argument --kv-cache-memory: a size must be",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith(sentence)
    assert error.count("\n") == 1


def test_what_a_command_refuses_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: argparse.Namespace) -> int:
        raise CommandError(f"{args.model} is not to be had")

    monkeypatch.setattr(plan, "run", refuse)
    assert cli.main(["plan", "--model", "moon", "--kv-cache-memory", "1GiB"]) == 2
    assert capsys.readouterr() == ("", "kvcompress plan: moon is not to be had\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_interrupt_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it comes, before the first result too."""

    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    module = importlib.import_module(f"vllm_kvcompress.tools.{cli.COMMANDS[name]}.command")
    monkeypatch.setattr(module, "run", interrupted)
    model = ["--model", "moon"]
    words = {
        "plan": [*model, "--kv-cache-memory", "1GiB"],
        "inspect": [*model, "--input", "x", "--output", "x"],
        "doctor": [],
    }
    assert cli.main([name, *words.get(name, [*model, "--output", "x"])]) == 130
    assert capsys.readouterr() == ("", f"kvcompress {name}: stopped\n")


WRITERS = {
    "inspect": ("inspection", ["--input", "x"], (".png", ".html")),
    "bench": ("bench", [], (".csv", ".md")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, words, suffixes = WRITERS[name]
    module = importlib.import_module(f"vllm_kvcompress.tools.{package}.command")
    monkeypatch.delattr(module, "make_job")
    for suffix in suffixes:
        path = tmp_path / f"x{suffix}"
        path.mkdir()
        given = [name, "--model", "moon", "--output", str(tmp_path / "x"), *words]
        assert refusal(capsys, given) == f"--output: cannot write {path}: Is a directory"
        path.rmdir()
    nowhere = str(tmp_path / "nowhere" / "x")
    given = [name, "--model", "moon", "--output", nowhere, *words]
    assert refusal(capsys, given).startswith("--output must be a name in a folder that exists")


def test_any_other_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(args: argparse.Namespace) -> int:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(plan, "run", break_down)
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(["plan", "--model", "moon", "--kv-cache-memory", "1GiB"])


def test_help_waits_for_nothing_heavy() -> None:
    script = (
        "import sys; from vllm_kvcompress.tools import cli; cli.build_parser().format_help(); "
        "heavy = {'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("12GiB", 12 << 30),
        ("800 MiB", 800 << 20),
        ("1.5gib", 3 << 29),
        ("80GB", 80 * 10**9),
        ("2TiB", 2 << 40),
        ("7kib", 7 << 10),
        ("9B", 9),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.2", "GiB", "-1GiB", "12GX", "1e9", "1.2.3GiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a size must be a number of bytes above 0"):
        parse_bytes(text)


def test_sizes_are_written_in_binary_units() -> None:
    sizes = [17, 1 << 10, 3 << 19, 80 << 30, 1023 << 20, 5 << 40]
    written = ["17 B", "1.00 KiB", "1.50 MiB", "80.00 GiB", "1023 MiB", "5.00 TiB"]
    assert [format_bytes(size) for size in sizes] == written


def test_the_example_of_a_plan_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPO / "docs" / "plan.md").read_text(encoding="utf-8")
    command = shlex.split(text.split("```sh\n")[1].split("```")[0].replace("\\\n", ""))
    assert command[0] == "kvcompress"
    command[command.index("--model") + 1] = str(MODELS / SMALL)
    assert cli.main(command[1:]) == 0
    printed = capsys.readouterr().out
    expected = text.split("```text\n")[1].split("```")[0]
    assert printed.replace(str(MODELS / SMALL), f"models/{SMALL}") == expected

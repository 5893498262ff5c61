"""Servers that tools start: what is left when one hangs or fails, and reading their logs."""

import sys
from pathlib import Path

import pytest

from vllm_kvcompress.tools import serving
from vllm_kvcompress.tools.arguments import CommandError

STAND_IN = """#!{python}
import sys, time
print("Error: nothing to do", flush=True)
if "--fail" in sys.argv:
    sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of vLLM's that hangs or fails."""
    program = tmp_path / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(serving, "VLLM", program)


@pytest.mark.usefixtures("stand_in")
def test_a_program_that_hangs_or_fails_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(CommandError, match="gave no answer within 0 s"),
        serving.serve("m", ["--hang"], log, 0.1),
    ):
        pass
    with (
        pytest.raises(CommandError, match="vllm serve did not start: Error: nothing to do"),
        serving.serve("m", ["--fail"], log, 60),
    ):
        pass


def test_what_a_server_logs_is_read_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('INFO A {"n": 1}\nINFO A_B {"n": 2}\nINFO A {"n": {}}\nINFO A {"n": {}')
    server = serving.RunningServer(1, log)
    assert server.lines("A") == [{"n": 1}, {"n": {}}]
    assert server.lines("A", since=10) == [{"n": {}}]
    assert server.wait_for("A_B", 2, seconds=0) == [{"n": 2}]

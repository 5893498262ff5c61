"""``kvcompress bench --vllm-bench``: command lines, vLLM's figures, and programs that fail."""

import sys
from pathlib import Path

import pytest

from tests.support.commands import parsed
from vllm_kvcompress.tools import serving
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.bench import command as bench
from vllm_kvcompress.tools.bench import vllm_bench
from vllm_kvcompress.tools.bench.block_watch import BlockWatch
from vllm_kvcompress.tools.bench.pairs import Paired


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments that are right, as far as this command reads them."""
    return ["bench", "--model", str(tmp_path), "--output", str(tmp_path / "out"), "--budget", "256"]


def vllm_job(words: list[str], *more: str) -> vllm_bench.VllmJob:
    return bench.make_vllm_job(parsed(words, *more))


def test_both_command_lines_differ_in_our_flags_alone(words: list[str]) -> None:
    made = vllm_job(
        words,
        *("--vllm-bench", "latency", "--block-size", "64", "--kv-cache-mib", "2", "--rounds", "2"),
        *("--engine-args", '{"max_model_len": 2048, "enforce_eager": true, "seed": 1}'),
        *("--config", '{"gamma": 50}', "--", "--input-len", "512", "--disable-detokenize"),
    )
    assert made.extra == ("--input-len", "512", "--disable-detokenize")
    assert made.rounds == 2
    plain = vllm_bench.engine_words(made, compressed=False)
    assert plain == [
        *("--block-size", "64", "--kv-cache-memory-bytes", str(2 << 20)),
        *("--max-model-len", "2048", "--enforce-eager", "--seed", "1"),
    ]
    ours = vllm_bench.engine_words(made, compressed=True)
    assert ours[: len(plain)] == plain
    assert ours[len(plain) :] == [
        *("--kv-compression", "cake", "--kv-compression-budget", "256"),
        *("--kv-compression-config", '{"gamma": 50}'),
    ]
    assert vllm_bench.flags_of({"a_b": False, "c": {"d": 1}}) == ["--no-a-b", "--c", '{"d": 1}']


STAND_IN = """#!{python}
import json, sys, time
words = sys.argv[1:]
print("Error: nothing to do" if "--fail" in words else words, flush=True)
if "--fail" in words:
    sys.exit(3)
if "--hang" in words:
    time.sleep(60)
fast = "--kv-compression" in words
out = words[words.index("--output-json") + 1]
with open(out, "w") as file:
    json.dump({{"requests_per_second": 2.0 if fast else 1.0, "tokens_per_second": 30.0}}, file)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of vLLM's that knows one of the benchmarks."""
    program = tmp_path / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(serving, "VLLM", program)


@pytest.mark.usefixtures("stand_in")
def test_vllms_figures_come_side_by_side(words: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    made = vllm_job(words, "--vllm-bench", "throughput", "--rounds", "2")
    requests, tokens = vllm_bench.measure(made, told.append)
    assert [text.partition("throughput, ")[2] for text in told] == [
        *("plain, round 1 of 2", "compressed, round 1 of 2"),
        *("compressed, round 2 of 2", "plain, round 2 of 2"),
    ]
    assert requests.title == "vllm bench throughput: requests a second"
    assert requests.paired == Paired((1.0, 1.0), (2.0, 2.0), more_is_better=True)
    assert (requests.paired.verdict, tokens.paired.verdict) == ("pays", "does not pay")
    # vLLM's own files stay, to be compared with others'.
    kept = {path.name for path in tmp_path.glob("out.*")}
    assert kept == {
        f"out.{which}-{number}.{suffix}"
        for which in ("plain", "compressed")
        for number in (1, 2)
        for suffix in ("json", "log")
    }


@pytest.mark.usefixtures("stand_in")
def test_a_benchmark_that_fails_says_where_to_look(words: list[str]) -> None:
    made = vllm_job(words, "--vllm-bench", "throughput", "--", "--fail")
    with pytest.raises(CommandError, match=r"failed: Error: nothing to do \(see .*plain-1\.log\)$"):
        list(vllm_bench.measure(made, lambda _: None))


def test_a_figure_that_is_missing_is_named() -> None:
    result = vllm_bench.VllmResult({"percentiles": {"50": 1.5}})
    with pytest.raises(CommandError, match=r"gives no percentiles\.90: .* got None"):
        list(vllm_bench.rows_of("latency", [(result, result)]))


@pytest.mark.usefixtures("stand_in")
def test_a_program_that_hangs_or_fails_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(CommandError, match="vllm --hang took more than 0 s"):
        serving.run(["--hang"], log, 0.1)
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


def test_blocks_are_read_from_the_servers_metrics(tmp_path: Path) -> None:
    watch = BlockWatch(serving.RunningServer(1, tmp_path))
    watch.look('vllm:cache_config_info{num_gpu_blocks="101"} 1.0\nvllm:kv_cache_usage_perc 0.25\n')
    watch.look("vllm:kv_cache_usage_perc 0.125\n")
    assert (watch.blocks, watch.pool_blocks) == (25, 100)

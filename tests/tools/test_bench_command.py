"""``kvcompress bench`` up to the engines: pools, byte bounds, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import SERVED, folder, parsed, refusal
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.bench import child_process
from vllm_kvcompress.tools.bench import command as bench
from vllm_kvcompress.tools.bench.cases import throughput_rows
from vllm_kvcompress.tools.bench.job import AMPLE, BOUND, DECODE, BenchCase, BenchJob, check_memory
from vllm_kvcompress.tools.bench.measure import Queue
from vllm_kvcompress.tools.plan.figures import Pool, SlidingWindows, Workload, plain_figures
from vllm_kvcompress.tools.plan.model import ServedModel

BLOCK_BYTES = 2 * 3 * 2 * 16 * 32 * 2


def job(**changes: Any) -> BenchJob:
    settings: dict[str, Any] = {
        "model": "m",
        "served": SERVED,
        "weights": 1_000_000,
        "settings": {"method": "cake", "budget": 256},
        "kinds": ("ttft", "decode", "throughput"),
        "lengths": (1024,),
        "batches": (1, 4),
        "pools": (BOUND, AMPLE),
        "rounds": 3,
        "steps": 8,
        "requests": 10,
        "generate": 128,
        "bound_requests": 3,
        "block_size": 32,
        "dtype": "auto",
        "cpu": True,
        "kv_bytes": None,
        "batched_tokens": None,
        "engine_args": {},
        "seed": 0,
    }
    return BenchJob(**{**settings, **changes})


# --- what is measured ------------------------------------------------------------------------


def test_cases_share_engines_where_the_pool_is_the_same() -> None:
    alone, bound, ample = job(lengths=(512, 1024)).setups()[:3]
    assert [str(case) for case in alone.cases] == [
        *("ttft 1 x 512", "ttft 1 x 1024"),
        *("decode 1 x 512", "decode 4 x 512", "decode 1 x 1024", "decode 4 x 1024"),
    ]
    assert (alone.name, bound.name, ample.name) == (AMPLE, BOUND, AMPLE)
    assert (alone.max_num_seqs, bound.max_num_seqs) == (4, 10)
    assert bound.cases == ample.cases == (BenchCase("throughput", 512, 10, 128),)
    # A prompt in one step, beside a token of each of the others.
    assert alone.batched_tokens == 1024 + 4
    assert job(batched_tokens=256).setups()[0].batched_tokens == 256
    assert [s.name for s in job(kinds=("throughput",), pools=(AMPLE,)).setups()] == [AMPLE]


def test_pools_hold_what_their_names_say() -> None:
    _, bound, ample = job().setups()
    assert job().block_bytes == BLOCK_BYTES
    assert bound.kv_bytes == bound.blocks * BLOCK_BYTES
    whole = (1024 + 128) // 32
    figures = [
        plain_figures(
            Pool(setup.kv_bytes, BLOCK_BYTES, 32),
            Workload(setup.max_model_len, 128, 8192),
            SlidingWindows(SERVED.groups, 32, setup.batched_tokens, 0),
        )
        for setup in (bound, ample)
    ]
    assert figures[0].requests == 3
    assert figures[1].requests >= 10 + 1
    assert bound.blocks == 3 * whole + 2
    # In a hybrid, sliding windows take blocks of the same pool.
    hybrid = ServedModel(**{**vars(SERVED), "layers": 6, "groups": LayerGroups(3, 1, 1, 512)})
    assert job(served=hybrid).setups()[1].blocks > bound.blocks


def test_a_batch_has_tokens_enough_for_all_its_turns() -> None:
    (setup, *_) = job(kinds=(DECODE,), batches=(4,), rounds=5, steps=10).setups()
    (case,) = setup.cases
    # Reading four prompts takes as many steps, in which those before go on generating.
    assert case.generate >= 4 + 4 + 5 * (2 + 10)
    chunked = job(kinds=(DECODE,), batches=(4,), batched_tokens=100).setups()[0].cases[0]
    assert chunked.generate >= 4 * 11 + 4 + 3 * (2 + 8)


def test_what_cannot_fit_is_said_before_anything_starts() -> None:
    setups = job().setups()
    most = max(setups, key=lambda setup: setup.kv_bytes)
    free = 2 * (most.kv_bytes + 1000)
    check_memory(most, 1000, free)
    with pytest.raises(CommandError, match=r"^two engines with .* are free; lower --lengths"):
        check_memory(most, 1000, free - 1)
    with pytest.raises(CommandError, match=r"--kv-cache-mib is too small for throughput 10 x 1024"):
        job(kv_bytes=3 << 20).setups()
    larger = job(kv_bytes=64 << 20).setups()
    assert [s.kv_bytes for s in larger] == [64 << 20, setups[1].kv_bytes, 64 << 20]
    with pytest.raises(CommandError, match=r"takes 8320 tokens .* longest context is 8192"):
        job(lengths=(8192,), kinds=("throughput",)).setups()
    with pytest.raises(CommandError, match=r"must be at least 10, one token for each .* got 8"):
        job(batched_tokens=8, kinds=("throughput",)).setups()


# --- bounds ----------------------------------------------------------------------------------


def test_a_throughput_is_two_rows() -> None:
    plain = Queue(10.0, 1000, 4.0, 100, 400, 100 * 40, 4, 40, 0)
    ours = Queue(5.0, 1000, 1.0, 50, 400, 50 * 40, 8, 40, 2)
    case = BenchCase("throughput", 1024, 10, 100)
    whole, decode = throughput_rows(job(weights=1000), BOUND, case, [(plain, ours)] * 2, (40, 100))
    assert (whole.case, decode.case) == ("throughput", "decode throughput")
    assert (whole.paired.plain, whole.paired.compressed) == ((100.0,) * 2, (200.0,) * 2)
    assert decode.paired.ratio == 4.0
    assert decode.bound == 2.0
    assert whole.bound == pytest.approx(1 / (0.6 + 0.4 / 2))
    assert whole.blocks == (40, 40)
    assert (whole.running, whole.preemptions) == ((4, 8), (0, 4))
    share, thrown_out = whole.notes
    assert share.startswith("plain vLLM spends 60% of the time in steps with a prompt")
    assert thrown_out == "0 and 4 preemptions"
    # Where a prompt is in every step, there are none of its own to compare.
    plain.decode_tokens = 0
    (only,) = throughput_rows(
        job(), BOUND, BenchCase("throughput", 64, 10, 1), [(plain, ours)], (40, 1)
    )
    assert only.bound is None
    assert only.notes[0] == "such prompts are kept whole, so this is what the flag alone costs"


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments that are right, with a model of a configuration and a small file of weights."""
    from safetensors.torch import save_file

    changes = {"vocab_size": 1000, "max_position_embeddings": 8192, "tie_word_embeddings": False}
    model = folder(tmp_path, num_hidden_layers=3, **changes)
    save_file({"w": torch.zeros(100_000, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    return ["bench", "--model", model, "--output", str(tmp_path / "out"), "--budget", "256"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--output", "/nowhere/out"], "--output must be a name in a folder that exists"),
        (["--model", "/nowhere"], "--model /nowhere is neither a folder with a config.json"),
        (["--method", "lru"], 'unknown method "lru", known are '),
        (["--budget", "much"], "got 'much'"),
        (["--budget", "32"], "32"),
        (["--config", "[]"], "argument --config: must be a JSON object, got '[]'"),
        (["--cases", "ttft,speed"], "argument --cases: must be some of ttft, decode, throughput"),
        (["--lengths", "1k"], "argument --lengths: must be a whole number of at least 1"),
        (["--rounds", "0"], "argument --rounds: must be a whole number of at least 1, got '0'"),
        (["--lengths", "8192"], "longest context is 8192; lower --lengths"),
        (["--kv-cache-mib", "1"], "--kv-cache-mib is too small for "),
    ],
)
def test_user_errors_are_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], sentence: str
) -> None:
    assert sentence in refusal(capsys, [*words, *change])


def test_a_command_line_becomes_a_job(words: list[str]) -> None:
    made = bench.make_job(parsed(words, "--cases", "decode,ttft", "--batches", "2, 4,2"))
    assert (made.kinds, made.batches, made.lengths) == (("decode", "ttft"), (2, 4), (1024, 4096))
    assert (made.rounds, made.steps, made.block_size, made.seed) == (3, 16, 32, 0)
    assert made.config.budget == 256
    # The input embedding is not tied to the head, and a step reads but a few of its rows.
    stored = Path(made.model, "model.safetensors").stat().st_size
    assert made.weights == stored - 1000 * 64 * 2


# --- a process of its own --------------------------------------------------------------------


class Pipe:
    """One end of a pipe that has got some messages."""

    def __init__(self, *messages: object) -> None:
        self.messages = list(messages)

    def recv(self) -> object:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)


def test_rows_come_from_the_other_process_until_it_has_no_more() -> None:
    def received(*messages: object) -> list[object]:
        return list(child_process._received(Pipe(*messages)))  # type: ignore[arg-type]

    assert received(1, 2, None) == [1, 2]
    with pytest.raises(CommandError, match="no such argument"):
        received(1, "no such argument")
    with pytest.raises(RuntimeError, match="ended before its last row"):
        received(1)


def test_settings_go_through_another_process_and_come_back() -> None:
    import pickle

    config = KVCompressionConfig.parse({"method": "cake", "budget": 0.25, "gamma": 50})
    made = job(settings=config.as_dict())
    assert pickle.loads(pickle.dumps(made)).config == config

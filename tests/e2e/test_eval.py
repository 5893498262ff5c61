"""``kvcompress eval`` on a real engine: who agrees with whom, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engine import Engine
from tests.e2e.harness import MODELS, REPO, SMALL, small_model
from tests.support.faulty_methods import faulty
from vllm_kvcompress.methods import available, registry
from vllm_kvcompress.tools.evaluation import tasks
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE, Record, Store, read
from vllm_kvcompress.tools.evaluation.runner import PromptSet, Runner, prepare
from vllm_kvcompress.tools.evaluation.setting import FULL, Setting, full
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Source

pytestmark = pytest.mark.engine

MODEL = str(MODELS / SMALL)
LENGTH, PROMPTS, SEED, SHARE = 512, 3, 5, 0.25
KEPT = 128
SETTINGS = [full(), Setting("cake", "cake", SHARE), Setting("random", "random", SHARE)]
PATIENCE = 240.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Source(MODEL, tokenizer, REPO / "models", tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    from vllm_kvcompress.tools.evaluation.vllm_backend import VllmBackend

    made = VllmBackend(
        MODEL,
        dtype="float32",
        block_size=32,
        max_model_len=1024,
        cache_mib=256,
        plain=False,
        engine_args={},
    )
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _books_add_up(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "backend" in request.fixturenames:
        engine = Engine(request.getfixturevalue("backend")._llm, compressed=True)
        engine.drain()
        engine.check()


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def batch_of(source: Source, task: str, protocol: str = AWARE) -> PromptSet:
    (found,) = tasks.find([task])
    (batch,) = prepare([PromptSet(found, LENGTH, protocol, SEED, PROMPTS)], source)
    return batch


def answers(backend: Any, batch: PromptSet, path: Path) -> dict[tuple[str, int], Record]:
    backend.check(SETTINGS)
    runner = Runner(backend, MODEL, "float32", Store(path))
    return {(r.label, r.index): r for r in runner.run(batch, SETTINGS)}


@pytest.fixture(scope="module")
def first(
    backend: Any, source: Source, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Record]:
    """The needles, the question among what is compressed."""
    path = tmp_path_factory.mktemp("first") / "results.jsonl"
    return answers(backend, batch_of(source, "needle"), path)


def test_full_cache_answers_as_transformers_does_and_a_rerun_scores_the_same(
    backend: Any,
    source: Source,
    reference: Any,
    first: dict[tuple[str, int], Record],
    tmp_path: Path,
) -> None:
    batch = batch_of(source, "needle")
    again = answers(backend, batch, tmp_path / "again.jsonl")
    assert len(first) == PROMPTS * len(SETTINGS)
    assert {key: r.score for key, r in again.items()} == {k: r.score for k, r in first.items()}
    for case in batch.cases:
        ids = torch.tensor([case.token_ids])
        made = reference.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
        said = source.tokenizer.decode(made, skip_special_tokens=True)
        ours = first[FULL, case.prompt.index]
        assert ours.text
        # An answer is stopped where its score cannot change.
        assert said.startswith(ours.text)
    assert {r.kept_tokens for (label, _), r in first.items() if label != FULL} == {KEPT}
    # What is kept at random does not hold the needle.
    full_score, random_score = (
        sum(first[label, i].score or 0 for i in range(PROMPTS)) for label in (FULL, "random")
    )
    assert full_score > random_score == 0


def test_in_the_agnostic_protocol_the_question_comes_after_the_cut(
    backend: Any, source: Source, first: dict[tuple[str, int], Record], tmp_path: Path
) -> None:
    agnostic = batch_of(source, "needle", AGNOSTIC)
    found = answers(backend, agnostic, tmp_path / "agnostic.jsonl")
    for case in agnostic.cases:
        index = case.prompt.index
        assert source.tokenizer.decode(case.fed_ids) == case.prompt.question
        # Nothing is lost of a full cache, so the order does not matter.
        assert found[FULL, index].score == first[FULL, index].score
        assert found["cake", index].prompt_tokens == len(case.token_ids)
        assert found["cake", index].kept_tokens == KEPT


def test_likelihoods_are_measured_through_the_cache_that_is_decoded_from(
    backend: Any, source: Source, reference: Any, tmp_path: Path
) -> None:
    batch = batch_of(source, "nll/needle")
    found = answers(backend, batch, tmp_path / "nll.jsonl")
    for case in batch.cases:
        ids = torch.tensor([[*case.token_ids, *case.measured_ids]])
        with torch.inference_mode():
            logits = reference(ids).logits[0, len(case.token_ids) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(case.measured_ids))
        index = case.prompt.index
        assert found[FULL, index].nll == pytest.approx(wanted.item(), abs=2e-3)
        # The needle is gone, so its number is a surprise.
        assert (found["random", index].nll or 0) > (found[FULL, index].nll or 0) + 0.1


def test_the_engines_own_refusals_are_one_sentence(backend: Any) -> None:
    with pytest.raises(EvaluationError, match=r"cake: .*gamma must be"):
        backend.check([Setting("cake", "cake", SHARE, {"gamma": -1})])


def test_a_method_that_fails_has_no_results(
    backend: Any, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available()
    monkeypatch.setitem(registry._methods, "faulty", faulty("raise"))
    batch, path = batch_of(source, "needle"), tmp_path / "faulty.jsonl"
    runner = Runner(backend, MODEL, "float32", Store(path))
    with pytest.raises(EvaluationError, match=r"failed, .*: faulty: scoring layer 3 has raised"):
        list(runner.run(batch, [Setting("faulty", "faulty", SHARE)]))
    assert not list(read(path))
    # The engine serves whoever asks next.
    assert all(record.text for record in runner.run(batch, [full()]))


def command(output: Path, *words: str) -> list[str]:
    common = ["--model", str(small_model()), "--output", str(output)]
    common += ["--data", str(REPO / "models"), "--tasks", "needle", "--lengths", str(LENGTH)]
    common += ["--prompts", str(PROMPTS), "--seeds", str(SEED)]
    common += ["--dtype", "float32", "--cache-mib", "256"]
    return [sys.executable, "-m", "vllm_kvcompress.tools.cli", "eval", *common, *words]


def test_a_killed_run_goes_on_where_it_was_and_agrees_with_plain_vllm(tmp_path: Path) -> None:
    words = command(tmp_path, "--methods", "full,cake,random", "--budgets", "0.125,0.25")
    lines = tmp_path / "results.jsonl"
    process = subprocess.Popen(words, cwd=REPO, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + PATIENCE
    while not (lines.is_file() and lines.read_bytes().count(b"\n") >= PROMPTS):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = lines.read_text(encoding="utf-8").splitlines()
    total = PROMPTS * 5
    assert len(before) < total
    # A line that was being written is no result.
    lines.write_text("\n".join(before) + '\n{"model": "smol', encoding="utf-8")

    done = subprocess.run(
        words, cwd=REPO, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{total - len(before)} answers to go, {len(before)} in" in " ".join(done.stderr.split())
    records = list(read(lines))
    assert len(records) == len({record.key for record in records}) == total
    assert lines.read_text(encoding="utf-8").splitlines()[: len(before)] == before
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "--seeds 5" in page
    assert "vllm_kvcompress" in page
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in page
    assert list(tmp_path.glob("*.png"))
    logged = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [entry["answers"] for entry in logged] == [total - len(before)]

    plain = tmp_path / "plain"
    subprocess.run(
        command(plain, "--methods", "full", "--backend", "plain"),
        cwd=REPO,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    theirs = {r.index: r.text for r in read(plain / "results.jsonl")}
    assert theirs == {r.index: r.text for r in records if r.label == FULL}

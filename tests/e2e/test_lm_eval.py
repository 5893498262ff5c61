"""lm_eval, as it is, runs compressed: its own command line on a task that lies in a folder."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import DEFAULTS, small_model

pytestmark = pytest.mark.engine

LM_EVAL = Path(sys.executable).with_name("lm_eval")
BUDGET, EXAMPLES = 96, 3
CHOICES = [" Anne", " the weather", " a letter"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Run:
    """A command that has ended.

    Attributes:
        code: Its exit status.
        log: What it wrote to the terminal.
        out: Where it wrote results.

    """

    code: int
    log: str
    out: Path

    def results(self) -> dict[str, Any]:
        """The score file."""
        (path,) = self.out.rglob("results_*.json")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def answers(self, task: str) -> list[Any]:
        """What the model answered to a task's examples, or their choices' log-likelihoods."""
        (path,) = self.out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line["resps"] for line in sorted(lines, key=lambda line: int(line["doc_id"]))]

    def cuts(self) -> list[dict[str, Any]]:
        """What log_requests wrote about every compressed request."""
        return [json.loads(text) for text in re.findall(r"KVCOMPRESS (\{.*\})", self.log)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, novel: str) -> Path:
    """Tasks on pages of a novel: go on, with requests' own settings too, or choose how to."""
    folder = tmp_path_factory.mktemp("tasks")
    starts = range(3_000, 3_000 + EXAMPLES * 6_000, 6_000)
    pages = [{"text": novel[start : start + 1_500], "answer": CHOICES[0]} for start in starts]
    lines = "".join(json.dumps(page) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text(lines, encoding="utf-8")
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pages.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    generation = {"until": [], "max_gen_toks": 32, "do_sample": False}
    made: dict[str, dict[str, Any]] = {
        name: {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {**generation, **own},
        }
        for name, own in {
            "kvc_goes_on": {},
            "kvc_full_cache": {"extra_args": {"kv_compression": "none"}},
            "kvc_scattered": {"extra_args": {"kv_compression": "scatter"}},
        }.items()
    }
    made["kvc_chooses"] = {
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": 0,
    }
    for name, task in made.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs by name, two at a time; settings reach lm_eval in each of the ways it has."""
    out = tmp_path_factory.mktemp("out")
    engine = {"pretrained": str(small_model()), **DEFAULTS}
    wanted = {
        "method": "cake",
        "budget": BUDGET,
        "allow": {"method": ["cake", "none", "scatter"]},
        "log_requests": True,
        "check_integrity": True,
    }
    config = {
        "model": "vllm",
        "model_args": {**engine, "additional_config": {"kv_compression": wanted}},
        "tasks": ["kvc_goes_on", "kvc_chooses", "kvc_full_cache", "kvc_scattered"],
    }
    (folder / "cake.conf").write_text(json.dumps(config))
    words = [f"{name}={value}" for name, value in engine.items()]
    wrong = {**engine, "additional_config": {"kv_compression": {"method": "zip"}}}
    commands = {
        "cake": ["run", "--config", str(folder / "cake.conf")],
        "plain": ["--model=vllm", "--tasks=kvc_goes_on,kvc_chooses", "--model_args", *words],
        "wrong": ["--model=vllm", "--tasks=kvc_goes_on", "--model_args", json.dumps(wrong)],
    }

    def run(name: str) -> Run:
        done = subprocess.run(
            [
                *(str(LM_EVAL), *commands[name], "--include_path", str(folder)),
                *("--output_path", str(out / name), "--log_samples"),
            ],
            env={
                **os.environ,
                **OFFLINE,
                "HF_HOME": str(out / f"{name}-home"),
                "OMP_NUM_THREADS": THREADS,
            },
            timeout=300,
            capture_output=True,
            text=True,
        )
        return Run(done.returncode, done.stdout + done.stderr, out / name)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


@pytest.mark.parametrize("name", ["plain", "cake"])
def test_scores_are_written(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.code == 0, run.log[-4000:]
    results = run.results()
    assert results["results"]["kvc_goes_on"]["exact_match,none"] == 0.0
    assert len(run.answers("kvc_goes_on")) == EXAMPLES
    given = results["config"]["model_args"].get("additional_config", {}).get("kv_compression", {})
    assert given.get("method", "plain") == name
    assert ("KV-cache compression is on: cake" in run.log) == (name == "cake")


def test_answers_come_from_the_compressed_cache(runs: dict[str, Run]) -> None:
    plain, cake = runs["plain"].answers("kvc_goes_on"), runs["cake"].answers("kvc_goes_on")
    assert all(one != other for one, other in zip(plain, cake, strict=True))
    assert runs["plain"].cuts() == []
    cuts = [cut for cut in runs["cake"].cuts() if cut["method"] == "cake"]
    assert len(cuts) == EXAMPLES * (1 + len(CHOICES))
    assert all(cut["prompt_tokens"] > 256 for cut in cuts)
    assert all(cut["blocks_after"] * cut["block_size"] == BUDGET for cut in cuts)


def test_a_tasks_own_settings_hold_for_its_requests(runs: dict[str, Run]) -> None:
    """scatter moves pages and keeps all; none does neither."""
    plain, cake = runs["plain"].answers("kvc_goes_on"), runs["cake"]
    assert cake.answers("kvc_full_cache") == plain
    assert cake.answers("kvc_scattered") == plain
    assert sum(cut["method"] == "scatter" for cut in cake.cuts()) == EXAMPLES


def test_likelihoods_do_not_show_compression(runs: dict[str, Run]) -> None:
    """They are of the prompt, which is compressed when they have been computed."""
    plain, cake = runs["plain"].answers("kvc_chooses"), runs["cake"].answers("kvc_chooses")
    assert len(plain) == EXAMPLES
    assert plain == cake


def test_a_wrong_setting_is_one_sentence(runs: dict[str, Run]) -> None:
    assert runs["wrong"].code != 0
    assert not list(runs["wrong"].out.rglob("results_*.json"))
    (sentence,) = re.findall(r"^ValueError: (.*)$", runs["wrong"].log, re.MULTILINE)
    assert sentence.startswith('unknown method "zip", known are cake, dynamickv, ')

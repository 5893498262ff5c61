"""RULER (Hsieh et al., arXiv 2404.06654): the 13 tasks, made by NVIDIA's own generators.

The generators of nvidia-long-context-eval run unchanged, in a process of their own, from the folder
that scripts/fetch_ruler.py makes; nothing is looked up on a network. As there, a length counts the
tokens to generate in, but for fwe, whose prompt alone may be that long; prompts come close to it
only in steps (500 words of essays, 10 documents), and the model template is "base", the prompt
ending in the answer's beginning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task

NAMES = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
NEEDS = ("nltk", "scipy", "tenacity", "wonderwords", "yaml")
"""Modules that the generators import."""

START_SECONDS = 900
"""Time after which a generator without any output is given up; it loads a tokenizer first."""

SILENT_SECONDS = 120
"""Time after which a generator that has begun is given up: if a length is too short for a
question's own documents, it tries the same prompt for ever."""

QUESTION_STRIDE = 50
"""Questions that lie between the first ones of two seeds in SQuAD and HotpotQA."""

MOST_QUESTIONS = 5900
"""Questions that are asked: SQuAD has 5928. So seeds 0 to 117 begin with different ones."""

_RUN = """
import itertools, random, runpy, sys
from os.path import dirname
from transformers import AutoTokenizer
_, draws, shuffles, *sys.argv = sys.argv
seed = random.seed
def seed_and_draw(value):
    seed(value)
    for _ in range(int(draws)):
        random.randint(0, 999999)
random.seed = seed_and_draw
class Shuffle(random.Random):
    turns = itertools.count()
    def __init__(self, value=None):
        super().__init__(f"{value} {next(self.turns)}")
if shuffles == "each":
    random.Random = Shuffle
sys.path[0] = dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a generator so that a seed means the same prompts everywhere.

Generators set the seed and then import transformers. If that is the first import of rich, rich
draws a random number; whether it is depends on the other installed packages. Therefore everything
is imported before the seed is set, and the number is drawn for all generators but niah's. This
gives the prompts that the generators make beside vLLM, where niah's nltk has imported rich already.

Each prompt is shuffled by a new generator, `random.Random(seed)`, of the one seed of the run, so
prompts with as many documents have them all in the same order. In qa the document with the answer
comes first before that, and would lie at one place in all prompts. There `shuffles` is "each", and
each shuffle differs. (In cwe and fwe it is the copies of the words that lie at the same places in
all prompts of a seed; they are spread over the whole prompt, and left as they are.)
"""

_NOTHING_FITS = re.compile(r"Num(ber of)? \w+: 0$")
"""Output of a generator before it tries the same too long prompt for ever."""

# Where the question begins: behind the context, at the last of these.
_MARKS = {
    "niah": ("\nWhat are all the special magic", "\nWhat is the special magic"),
    "variable_tracking": ("\nQuestion: Find all variables",),
    "common_words_extraction": ("\nQuestion: What are the 10 most common",),
    "freq_words_extraction": ("\nQuestion: Do not provide any explanation",),
    "qa": ("\n\nAnswer the question based on the given documents.",),
}


@dataclass(frozen=True)
class Ruler(Task):
    """One of RULER's tasks."""

    subtask: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name on the command line."""
        return f"ruler/{self.subtask}"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Make prompts of at most ``length`` tokens, those to generate included, as RULER counts.

        Another seed makes other needles and haystacks and, in qa_1 and qa_2, asks other questions.
        RULER's file is kept in ``source.cache``.

        Raises:
            EvaluationError: RULER's folder is not there, a package is missing, or the generator
                cannot make such prompts.

        """
        folder = source.data / "ruler"
        config = _config(folder, self.subtask)
        what = [self.subtask, dict(config), length, seed, source.model, source.tokenizer.vocab_size]
        if config["task"] == "qa":  # files made before have all answers in one place
            what.append("each shuffled")
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        path = source.cache / f"{self.subtask}-{length}-{seed}-{digest}.jsonl"
        lines = _read(path)
        if len(lines) < count:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="ruler-", dir=path.parent) as scratch:
                options = {
                    "save_dir": scratch,
                    "save_name": self.subtask,
                    "tokenizer_path": source.model,
                    "tokenizer_type": "hf",
                    "max_seq_length": length,
                    "num_samples": count,
                    "random_seed": seed,
                }
                _generate(folder.absolute(), config, options)
                shutil.move(Path(scratch) / self.subtask / "validation.jsonl", path)
            lines = _read(path)
        return [_prompt(config, line) for line in lines[:count]]


def _prompt(config: Mapping[str, Any], line: Mapping[str, Any]) -> Prompt:
    text: str = line["input"]
    cut = max(text.rfind(mark) for mark in _MARKS[config["task"]])
    if cut < 0:
        raise EvaluationError(f"no question was found in a prompt of RULER's {config['task']}")
    return Prompt(
        index=line["index"],
        context=text[:cut],
        question=text[cut:],
        opening=_opening(config["answer_prefix"], text),
        references=tuple(line["outputs"]),
        max_tokens=config["tokens_to_generate"],
        metric="match_part" if config["task"] == "qa" else "match_all",
    )


def _opening(prefix: str, text: str) -> str:
    """The answer prefix as it stands at the end of a prompt, where its fields are filled in."""
    start = text.rfind(prefix.partition("{")[0]) if prefix else -1
    return text[start:] if start >= 0 else ""


@lru_cache(maxsize=32)
def _config(folder: Path, subtask: str) -> Mapping[str, Any]:
    """A task's entry as RULER's prepare.py makes it: arguments, template, tokens to generate."""
    if not (folder / "long_context_eval" / "synthetic.yaml").is_file():
        raise EvaluationError(
            f"RULER is not in {folder}: run scripts/fetch_ruler.py, or name with --data the folder "
            "that holds ruler/"
        )
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise EvaluationError(
            f"RULER's generators need {', '.join(missing)}: pip install 'vllm_kvcompress[eval]'"
        )
    import yaml

    text = (folder / "long_context_eval" / "synthetic.yaml").read_text(encoding="utf-8")
    custom = yaml.safe_load(text)[subtask]
    path = folder / "long_context_eval" / "data" / "synthetic" / "constants.py"
    base = runpy.run_path(str(path))["TASKS"][custom["task"]]
    prefix = base.get("answer_prefix", "")
    return {**custom, **base, "template": base["template"] + prefix, "answer_prefix": prefix}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # Not splitlines: texts hold characters that it takes for ends of lines.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _generate(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Run a task's generator as RULER's prepare.py does."""
    script = folder / "long_context_eval" / "data" / "synthetic" / f"{config['task']}.py"
    given = {
        **options,
        "tokens_to_generate": config["tokens_to_generate"],
        "template": config["template"],
        **config["args"],
    }
    if config["task"] == "qa":
        given["pre_samples"] = options["random_seed"] * QUESTION_STRIDE % MOST_QUESTIONS
    # One word each: a template may begin with a dash, and a shell would read its newlines.
    words = [f"--{name}={value}" for name, value in given.items()]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "NLTK_DATA": str(folder / "nltk_data"),
        "HF_HUB_OFFLINE": "1",
    }
    draws = "0" if config["task"] == "niah" else "1"
    shuffles = "each" if config["task"] == "qa" else "alike"
    command = [sys.executable, "-u", "-c", _RUN, draws, shuffles, str(script), *words]
    _run(command, environment, options["save_name"], options["max_seq_length"])


def _run(command: list[str], environment: Mapping[str, str], subtask: str, length: int) -> None:
    """Run a generator to its end; EvaluationError if it fails, or would never end."""
    too_short = EvaluationError(
        f"RULER's {subtask} cannot be made with {length} tokens, those to generate included: ask "
        "for a greater length"
    )
    last = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        timer = _kill_after(START_SECONDS, process)
        for line in process.stdout or ():  # one for each step of its progress bar too
            timer.cancel()
            timer = _kill_after(SILENT_SECONDS, process)
            last = line.strip() or last
            if _NOTHING_FITS.match(line):
                process.kill()
        timer.cancel()
    if process.returncode < 0 and not last:
        raise EvaluationError(
            f"RULER's generator of {subtask} said nothing for {START_SECONDS} s: the machine is "
            "too busy, or the tokenizer does not load"
        )
    if process.returncode < 0:
        raise too_short
    if process.returncode:
        raise EvaluationError(f"RULER's generator of {subtask} failed: {last}")


def _kill_after(seconds: float, process: subprocess.Popen[str]) -> threading.Timer:
    """Kill a process after some seconds, unless the timer is cancelled."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    return timer

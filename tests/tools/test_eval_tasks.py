"""Tasks make the same prompts again, of the length asked for, and say what they lack."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.harness import MODELS, REPO, SMALL
from vllm_kvcompress.tools.evaluation import tasks
from vllm_kvcompress.tools.evaluation.metrics import METRICS, match_all, match_part
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Source
from vllm_kvcompress.tools.evaluation.tasks import likelihood, needle, ruler


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    model = str(MODELS / SMALL)
    return Source(
        model,
        AutoTokenizer.from_pretrained(model),
        REPO / "models",
        tmp_path_factory.mktemp("prompts"),
    )


@pytest.mark.parametrize("name", ["niah_single_3", "niah_multiquery", "vt", "cwe", "fwe"])
def test_rulers_own_generator_makes_the_prompts(source: Source, name: str) -> None:
    task = ruler.Ruler(name)
    prompts = task.prompts(source, length=1024, count=4, seed=7)
    assert [p.index for p in prompts] == [0, 1, 2, 3]
    for prompt in prompts:
        tokens = source.count(prompt.text)
        # fwe is made without a last look at its length.
        assert 500 < tokens <= 1024 - (0 if name == "fwe" else prompt.max_tokens)
        if not name.startswith("niah"):
            continue
        assert all(answer in prompt.context for answer in prompt.references)
        assert not any(answer in prompt.question for answer in prompt.references)
    assert task.prompts(source, length=1024, count=2, seed=7) == prompts[:2]
    others = task.prompts(source, length=1024, count=2, seed=8)
    assert {p.context for p in others}.isdisjoint(p.context for p in prompts)


def test_all_thirteen_tasks_are_there(source: Source) -> None:
    assert len(tasks.find(["ruler"])) == 13
    text = (source.data / "ruler" / "long_context_eval" / "synthetic.yaml").read_text()
    in_ruler = {line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "}
    assert in_ruler == set(ruler.NAMES)


def test_other_seeds_ask_other_questions(source: Source) -> None:
    first, second = (
        ruler.Ruler("qa_1").prompts(source, length=3072, count=2, seed=seed) for seed in (0, 1)
    )
    assert {p.question for p in first}.isdisjoint(p.question for p in second)
    assert all(p.metric == "match_part" for p in first)


def test_the_answer_lies_in_a_document_of_its_own_in_each_prompt(source: Source) -> None:
    data = source.data / "ruler" / "long_context_eval" / "data" / "synthetic" / "json"
    squad = json.loads((data / "squad.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in squad for paragraph in article["paragraphs"]]
    holds = {qa["question"]: p["context"] for p in paragraphs for qa in p["qas"]}
    prompts = ruler.Ruler("qa_1").prompts(source, length=2048, count=20, seed=100)
    assert [p.index for p in prompts] == list(range(20))
    places = []
    for prompt in prompts:
        (asked,) = (q for q in holds if prompt.question.endswith(f"Question: {q}{prompt.opening}"))
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", prompt.context)[1:]
        places.append(documents.index(holds[asked]))
        assert len(documents) == 10
        assert source.count(prompt.text) <= 2048 - prompt.max_tokens
    # Ten places, 20 draws: 9 of them on average.
    assert len(set(places)) > 5, places


def test_a_length_that_cannot_be_is_one_sentence(source: Source) -> None:
    with pytest.raises(EvaluationError, match=r"RULER's qa_1 cannot be made with 512 tokens"):
        ruler.Ruler("qa_1").prompts(source, length=512, count=1, seed=0)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("ruler/vt", r"RULER is not in .*ruler: run scripts/fetch_ruler.py, or name with --data"),
        ("needle", r"is not there: run scripts/fetch_ruler.py, or name with --data"),
        ("perplexity", r"put one at .*perplexity.txt, or run scripts/fetch_ruler.py"),
    ],
)
def test_missing_data_is_one_sentence(
    source: Source, tmp_path: Path, task: str, words: str
) -> None:
    (found,) = tasks.find([task])
    empty = Source(source.model, source.tokenizer, tmp_path, tmp_path)
    with pytest.raises(EvaluationError, match=words):
        found.prompts(empty, length=1024, count=1, seed=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rulers", r"there is no task 'rulers': known are longbench, needle, perplexity, ruler$"),
        ("ruler/niah", r"no task 'ruler/niah': known are ruler/niah_single_1, .*ruler/vt"),
        ("nll/nothing", r"there is no task 'nll/nothing'"),
    ],
)
def test_a_name_that_is_none_is_one_sentence(name: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        tasks.find([name])


def test_the_needle_lies_at_every_depth(source: Source) -> None:
    prompts = needle.NeedleGrid().prompts(source, length=512, count=12, seed=0)
    assert [p.labels["depth"] for p in prompts] == [*needle.DEPTHS, 0, 11]
    for prompt in prompts:
        assert 480 < source.count(prompt.text) <= 512
        assert prompt.question.startswith("\nWhat is the special magic number")
    at = [p.context.index(p.references[0]) / len(p.context) for p in prompts[:10]]
    assert at == sorted(at)
    assert at[0] < 0.2
    assert at[-1] > 0.95


def test_the_needles_keys_are_all_pairs_in_order() -> None:
    adjectives, nouns = ["old", "odd", "old-fashioned", "ol", "odd"], ["x", "gate", "fashioned-x"]
    keys = needle._Keys(adjectives, nouns)
    pairs = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert [keys[i] for i in range(len(keys))] == pairs


def test_perplexity_goes_on_where_the_context_ends(source: Source) -> None:
    prompts = likelihood.Perplexity().prompts(source, length=256, count=3, seed=1)
    text = " ".join(likelihood._text(source))
    for prompt in prompts:
        assert prompt.measured is not None
        assert prompt.context + prompt.measured in text
        assert 250 < source.count(prompt.context) <= 256
        assert len(prompt.measured.split()) == likelihood.CONTINUATION_WORDS
    assert len({p.context for p in prompts}) == 3


def test_a_text_of_ones_own(source: Source, tmp_path: Path) -> None:
    (tmp_path / "perplexity.txt").write_text("one two three " * 200)
    own = Source(source.model, source.tokenizer, tmp_path, tmp_path)
    (prompt,) = likelihood.Perplexity().prompts(own, length=64, count=1, seed=0)
    assert set(prompt.context.split()) == {"one", "two", "three"}
    with pytest.raises(EvaluationError, match="a text of 600 words is too short for 1000 tokens"):
        likelihood.Perplexity().prompts(own, length=1000, count=1, seed=0)


def test_right_answers_are_measured(source: Source) -> None:
    (task,) = tasks.find(["nll/ruler/niah_multiquery"])
    assert task.name == "nll/ruler/niah_multiquery"
    (plain,) = ruler.Ruler("niah_multiquery").prompts(source, length=1024, count=1, seed=7)
    (measured,) = task.prompts(source, length=1024, count=1, seed=7)
    assert measured.measured == " " + ", ".join(plain.references)
    assert (measured.context, measured.metric) == (plain.context, "")


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("needle", " The special magic number for"),
        ("ruler/niah_multiquery", " The special magic numbers for"),
        ("ruler/vt", " Answer: According to the chain(s) of variable assignment in the text"),
    ],
)
def test_a_chat_has_the_template_around_the_question_and_opens_the_answer(
    source: Source, name: str, opening: str
) -> None:
    plain_task, chat_task = tasks.find([name, f"chat/{name}"])
    (plain,) = plain_task.prompts(source, length=1024, count=1, seed=7)
    (made,) = chat_task.prompts(source, length=1024, count=1, seed=7)
    assert chat_task.name == f"chat/{name}"
    assert plain.opening.startswith(opening)
    assert plain.question.endswith(plain.opening)
    asked = plain.question.removesuffix(plain.opening)
    message = [{"role": "user", "content": plain.context + asked}]
    text = source.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert made.text == text + plain.opening
    assert made.references == plain.references
    (measured,) = tasks.find([f"nll/chat/{name}"])
    assert measured.name == f"nll/chat/{name}"


def test_a_chat_needs_a_template(source: Source) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.model)
    tokenizer.chat_template = None
    (task,) = tasks.find(["chat/needle"])
    bare = Source(source.model, tokenizer, source.data, source.cache)
    with pytest.raises(EvaluationError, match=r"chat/ tasks need a chat template, which .* lacks"):
        task.prompts(bare, length=512, count=1, seed=0)


@pytest.mark.parametrize(
    ("text", "all_of", "any_of"), [("a B", 2 / 3, 1.0), ("", 0.0, 0.0), ("cab", 1.0, 1.0)]
)
def test_rulers_metrics(text: str, all_of: float, any_of: float) -> None:
    assert match_all(text, ("A", "b", "c")) == pytest.approx(all_of)
    assert match_part(text, ("A", "b", "c")) == any_of


def test_an_answer_is_settled_only_when_no_text_can_change_its_score() -> None:
    metric = METRICS["match_all"]
    assert metric.settled("a b", ("a", "b"))
    assert not metric.settled("a", ("a", "b"))
    for name, other in METRICS.items():
        if not other.monotone:
            assert not other.settled("a", ("a",)), name


@pytest.mark.parametrize("draws", [0, 1])
def test_what_a_generator_imports_after_its_seed_leaves_the_prompts(
    tmp_path: Path, draws: int
) -> None:
    script = tmp_path / "generator.py"
    script.write_text(
        "import random, sys\n"
        "random.seed(int(sys.argv[1]))\n"
        "from transformers import AutoTokenizer\n"
        "import rich.style\n"
        "print(random.random())\n"
    )
    command = [sys.executable, "-c", ruler._RUN, str(draws), "alike", str(script), "7"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    expected = random.Random(7)
    for _ in range(draws):
        expected.randint(0, 999999)
    assert float(out) == expected.random()


@pytest.mark.parametrize(
    ("limit", "begins", "sentence"),
    [
        ("START_SECONDS", "", "vt said nothing for 1 s"),
        ("SILENT_SECONDS", "print('begun'); ", "vt cannot be made with 1024 tokens"),
    ],
)
def test_a_silent_generator_is_given_up(
    monkeypatch: pytest.MonkeyPatch, limit: str, begins: str, sentence: str
) -> None:
    monkeypatch.setattr(ruler, limit, 1)
    command = [sys.executable, "-uc", f"import time; {begins}time.sleep(600)"]
    with pytest.raises(EvaluationError, match=sentence):
        ruler._run(command, os.environ, "vt", 1024)

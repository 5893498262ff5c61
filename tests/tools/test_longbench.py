"""LongBench: official prompts and scores, on examples made here in its files' format."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import MODELS, SMALL
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source
from vllm_kvcompress.tools.evaluation.tasks import find
from vllm_kvcompress.tools.evaluation.tasks.longbench import CLASSES, SETS, LongBench

OFFICIAL = {
    "narrativeqa": ("ca9f07fdf9f532e1", 128),
    "qasper": ("2348612ac9bae220", 128),
    "multifieldqa_en": ("c19398b7471faa00", 64),
    "multifieldqa_zh": ("39c14d7ae023c244", 64),
    "hotpotqa": ("d31e73b501d5c9db", 32),
    "2wikimqa": ("d31e73b501d5c9db", 32),
    "musique": ("d31e73b501d5c9db", 32),
    "dureader": ("66de4f9799dce491", 128),
    "gov_report": ("e64c669fb47c1fb6", 512),
    "qmsum": ("1ba55beaab0774e0", 512),
    "multi_news": ("2fa37178a851e562", 512),
    "vcsum": ("333ce30a208ff7d1", 512),
    "trec": ("a31ea386ec87ceb0", 64),
    "triviaqa": ("0ef1603d346d3bfe", 32),
    "samsum": ("b184d51d1f91b5e1", 128),
    "lsht": ("e414415003646b77", 64),
    "passage_count": ("fa3f78681dd457ea", 32),
    "passage_retrieval_en": ("8f1eab757de59e2c", 32),
    "passage_retrieval_zh": ("4632499f641fe741", 32),
    "lcc": ("c3d427e651b3b7cc", 64),
    "repobench-p": ("91686225aaaba008", 64),
}
"""From LongBench's dataset2prompt.json and dataset2maxlen.json at 2e00731: the first 16 digits of
the sha256 of the prompt about the context CONTEXT with the input INPUT; the longest answer."""


class Words:
    """A tokenizer of words and one special token in front."""

    vocab_size = 1 << 20

    def __init__(self) -> None:
        self._words: list[str] = ["<s>"]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        for word in text.split():
            if word not in self._words:
                self._words.append(word)
            ids.append(self._words.index(word))
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(f" {self._words[i]}" for i in ids)


def example(**fields: Any) -> dict[str, Any]:
    """An example as LongBench writes it."""
    return {
        "input": "INPUT",
        "context": "CONTEXT",
        "answers": ["ANSWER"],
        "length": 3,
        "dataset": "any",
        "language": "en",
        "all_classes": None,
        "_id": "7f",
        **fields,
    }


def source_of(folder: Path, dataset: str, *examples: dict[str, Any], **fields: Any) -> Source:
    """A source whose only file has these examples."""
    path = folder / "longbench" / f"{dataset}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line, ensure_ascii=False) for line in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"model": "words", "tokenizer": Words(), "data": folder, "cache": folder, **fields}
    return Source(**given)


def made(source: Source, dataset: str, length: int = 10_000, **options: int) -> list[Prompt]:
    return LongBench(dataset).prompts(
        source, **{"length": length, "count": 9, "seed": 0, **options}
    )


def score(dataset: str, text: str, *references: str) -> float:
    return METRICS[f"longbench_{dataset}"].score(text, references)


def test_all_sets_are_there() -> None:
    assert [task.name for task in find(["longbench"])] == [f"longbench/{name}" for name in SETS]
    assert set(SETS) == set(OFFICIAL)
    assert {f"longbench_{name}" for name in SETS} <= set(METRICS)
    assert not any(METRICS[f"longbench_{name}"].monotone for name in SETS)


@pytest.mark.parametrize("dataset", SETS)
def test_prompts_are_the_official_ones(tmp_path: Path, dataset: str) -> None:
    classes = ["ANSWER", "OTHER"] if dataset in ("trec", "lsht") else None
    source = source_of(tmp_path, dataset, example(all_classes=classes))
    (prompt,) = made(source, dataset)
    whole = prompt.text
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    assert (digest, prompt.max_tokens) == OFFICIAL[dataset]
    assert prompt.context.endswith("CONTEXT")
    assert prompt.references == (("ANSWER", CLASSES, *classes) if classes else ("ANSWER",))
    assert prompt.metric == f"longbench_{dataset}"
    assert prompt.labels == {"id": "7f", "language": "en", "cut": 0}


def test_texts_are_not_templates(tmp_path: Path) -> None:
    texts = {"context": "{{ question }}\u2028{% raw", "input": "{{context}}"}
    (prompt,) = made(source_of(tmp_path, "lcc", example(**texts)), "lcc")
    assert prompt.context.endswith(" \n{{ question }}\u2028{% raw")
    (prompt,) = made(source_of(tmp_path, "trec", example(**texts)), "trec")
    assert prompt.question == "\n{{context}}"


def test_a_seed_is_an_order(tmp_path: Path) -> None:
    examples = [example(_id=str(number)) for number in range(20)]
    source = source_of(tmp_path, "qasper", *examples)

    def ids(seed: int, count: int) -> list[Any]:
        found = made(source, "qasper", seed=seed, count=count)
        assert [prompt.index for prompt in found] == list(range(len(found)))
        return [prompt.labels["id"] for prompt in found]

    assert ids(0, 3) == ["0", "1", "2"]
    assert ids(0, 50) == [str(number) for number in range(20)]
    assert ids(1, 20) == ids(1, 50) != ids(2, 20)
    assert ids(1, 5) == ids(1, 20)[:5]
    assert sorted(ids(1, 20)) == sorted(ids(0, 20))


def test_the_middle_of_a_long_prompt_goes(tmp_path: Path) -> None:
    """Counted by hand: 1 special token, 1 word, the context's 100, the question's 2."""
    words = [f"w{number}" for number in range(100)]
    source = source_of(tmp_path, "lsht", example(context=" ".join(words), input="how many?"))
    (whole,) = made(source, "lsht", length=104)
    assert whole.labels["cut"] == 0
    first, *_ = whole.context.split()
    (prompt,) = made(source, "lsht", length=102)
    assert prompt.labels["cut"] == 1
    assert prompt.question == whole.question == "\nhow many?"
    # Halves of 51: a special token, a word and w0 to w48; w51 to w99 and two words.
    assert prompt.context.split() == [first, *words[:49], *words[51:]]
    for length in (103, 102, 51, 20):
        (prompt,) = made(source, "lsht", length=length)
        ids = source.tokenizer(whole.text)["input_ids"]
        half = length // 2
        official = [*ids[:half], *ids[-half:]]
        assert source.tokenizer(prompt.text)["input_ids"] == official


def test_a_question_is_never_cut(tmp_path: Path) -> None:
    question = " ".join(f"q{number}" for number in range(30))
    source = source_of(tmp_path, "lsht", example(context="one two three " * 20, input=question))
    (prompt,) = made(source, "lsht", length=40)
    assert prompt.question == f"\n{question}"
    assert source.count(prompt.text) == 40
    with pytest.raises(
        EvaluationError, match=r"^length 31 is too short for longbench/lsht: .* 31 "
    ):
        made(source, "lsht", length=31)


@pytest.mark.parametrize("length", [200, 333])
def test_cut_prompts_fit_in_a_models_own_tokens(tmp_path: Path, length: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / SMALL)
    # Characters of several tokens, and spaces that are merged where the halves meet.
    texts = {"context": "長い文章。  \n\t🙂 naïve" * 200, "input": "何ですか"}
    source = source_of(tmp_path, "dureader", example(**texts), tokenizer=tokenizer)
    (whole,) = made(source, "dureader", length=100_000)
    (prompt,) = made(source, "dureader", length=length)
    assert length - 12 < source.count(prompt.text) <= length
    assert prompt.question == whole.question
    assert prompt.context[:80] == whole.context[:80]
    assert prompt.context[-40:] == whole.context[-40:]


@pytest.mark.parametrize(
    ("dataset", "text", "references", "expected"),
    [
        # F1 of words without articles and punctuation: precision 1, recall 2/3; the best counts.
        ("qasper", " The red house.", ("a big, red house", "barn"), 0.8),
        ("hotpotqa", "no", ("yes",), 0.0),
        ("narrativeqa", "x\ny", ("x",), 2 / 3),
        # 北京大学 / 在 / 北京: precision 1, recall 1/3.
        ("multifieldqa_zh", "北京大学。", ("北京大学在北京",), 0.5),
        # ROUGE-L: precision 1, recall 3/4.
        ("gov_report", "the cat sat", ("the cat sat down",), 6 / 7),
        ("qmsum", "", ("the cat sat down",), 0.0),
        ("dureader", "北京大学", ("北京大学在北京",), 0.5),
        ("triviaqa", "\n\nParis\nPassage: London", ("Paris",), 1.0),
        ("samsum", "the cat sat\nDialogue: no", ("the cat sat down",), 6 / 7),
        # One of the classes that the first line names is right.
        ("trec", "\nSport or Food\nArt", ("Food", CLASSES, "Art", "Food", "Sport"), 0.5),
        ("trec", "Art\nFood", ("Food", CLASSES, "Art", "Food", "Sport"), 0.0),
        # A class within the right one's name does not count against it.
        ("lsht", "Fast Food", ("Fast Food", CLASSES, "Food", "Fast Food"), 1.0),
        # Share of the numbers.
        ("passage_count", "7, 8 or 7", ("7",), 2 / 3),
        ("passage_retrieval_en", "Paragraph 12, or 3", ("Paragraph 12",), 0.5),
        ("passage_retrieval_zh", "段落5", ("段落5",), 1.0),
        # Edit similarity, in per cent, of the first line that is no comment: 2 * 10 / (12 + 10).
        ("lcc", "\n# sum\nreturn a + b\nx = 1", ("return a+b",), 0.91),
        ("repobench-p", "    return a", ("    return a",), 1.0),
    ],
)
def test_scores(dataset: str, text: str, references: tuple[str, ...], expected: float) -> None:
    assert score(dataset, text, *references) == pytest.approx(expected, abs=1e-6)


def test_examples_may_come_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in a hub's layout, with the names that lm_eval's copy has."""
    pytest.importorskip("datasets").disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = example()
    row["question"] = row.pop("input")
    hub = tmp_path / "hub"
    (hub / "qasper").mkdir(parents=True)
    (hub / "qasper" / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: qasper\n  data_files:\n  - split: test\n"
        "    path: qasper/*.jsonl\n---\n"
    )
    source = source_of(tmp_path, "qasper", example())
    (expected,) = made(source, "qasper")
    task, other = find(["longbench/qasper", "longbench/trec"], str(hub))
    assert task.prompts(source, length=999, count=1, seed=0) == [expected]
    with pytest.raises(EvaluationError, match=r"^longbench/trec cannot be loaded from .*hub: "):
        other.prompts(source, length=999, count=1, seed=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = source_of(tmp_path, "qasper", example())
    with pytest.raises(EvaluationError) as caught:
        made(source, "trec")
    path = tmp_path / "longbench" / "trec.jsonl"
    assert str(caught.value) == (
        f"longbench/trec needs {path}: take it from data.zip of the dataset THUDM/LongBench on "
        "the Hugging Face hub"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1", "is no JSON object: "),
        ("3", "is no JSON object: "),
        (json.dumps(example(context=None)), "needs a text as context, got None"),
        (json.dumps(example(input=4)), "needs a text as input, got 4"),
        (json.dumps(example(answers="x")), "needs a list of texts as answers, got 'x'"),
        (json.dumps(example(answers=[])), "needs a list of texts as answers, got []"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    source = source_of(tmp_path, "qasper", example())
    path = tmp_path / "longbench" / "qasper.jsonl"
    path.write_text(f"{json.dumps(example())}\n{line}\n", encoding="utf-8")
    with pytest.raises(EvaluationError) as caught:
        made(source, "qasper")
    assert str(caught.value).startswith(f"{path}, line 2, {expected}")


@pytest.mark.parametrize("package", ["lm_eval", "jieba", "fuzzywuzzy", "rouge"])
def test_missing_packages_are_named(tmp_path: Path, package: str) -> None:
    """In a process of its own: what is imported once stays."""
    source_of(tmp_path, "qasper", example())
    code = (
        "import pathlib, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from vllm_kvcompress.tools.evaluation.task import EvaluationError, Source\n"
        "from vllm_kvcompress.tools.evaluation.tasks.longbench import LongBench\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    source = Source('m', None, folder, folder)\n"
        "    LongBench('qasper').prompts(source, length=9, count=1, seed=0)\n"
        "except EvaluationError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout == (
        "longbench/qasper needs lm_eval, datasets, jieba, fuzzywuzzy and rouge, one of which is "
        "missing: install vllm_kvcompress[eval]\n"
    )

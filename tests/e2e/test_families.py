"""Small models of many families, served plain and compressed, against docs/compatibility.md.

`python -m tests.e2e.family_run` writes the page's table from what it saw.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.family_run import SECONDS
from tests.e2e.harness import REPO
from tests.support.compatibility_page import REFUSED, UNTESTED, WORKS, family_table
from tests.support.model_families import FAMILIES

pytestmark = pytest.mark.engine

ALWAYS = ("gpt-oss", "Gemma 2", "Falcon, ALiBi")
"""Sinks and windows, a soft cap, a refusal; the others are slow."""


def outcomes(families: list[str]) -> dict[str, dict[str, Any]]:
    """What came of families that are served one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.family_run", *families],
        cwd=REPO, capture_output=True, text=True, timeout=60 + 3 * SECONDS * len(families),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [s.removeprefix("RESULT ") for s in done.stdout.splitlines() if s.startswith("RESULT ")]
    return {found.pop("family"): found for found in map(json.loads, lines)}


def check(families: list[str]) -> None:
    """Answers are right, refusals come before the weights, and the page says just that."""
    found = outcomes(families)
    assert list(found) == families
    assert {name: seen["faults"] for name, seen in found.items() if seen["faults"]} == {}
    assert [name for name, seen in found.items() if seen["weights_loaded"]] == []
    page = family_table()
    assert {name: (seen["state"], seen["sentence"]) for name, seen in found.items()} == {
        name: page[name] for name in families
    }


def test_the_page_has_all_families() -> None:
    page = family_table()
    assert list(page) == list(FAMILIES)
    assert {state for state, _ in page.values()} <= {WORKS, REFUSED, UNTESTED}


def test_sinks_a_soft_cap_and_a_refusal() -> None:
    check(list(ALWAYS))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ALWAYS])
def test_a_family(family: str) -> None:
    check([family])

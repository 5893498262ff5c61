"""Fixtures of the engine tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import MODELS, REPO, SMALL, Engines


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """Engines shared by the tests of one file."""
    made = Engines()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _books_add_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: integrity on both sides, and no block missing from any pool."""
    yield
    if "engines" in request.fixturenames:
        for engine in request.getfixturevalue("engines"):
            engine.check()


@pytest.fixture(scope="session")
def prose() -> list[int]:
    """Several thousand tokens of English prose for the small model."""
    from transformers import AutoTokenizer

    files = sorted(Path(REPO / "scripts" / "data").glob("*.txt"))
    text = files[0].read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / SMALL)
    return list(tokenizer(text)["input_ids"])

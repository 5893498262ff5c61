"""Fixtures of the engine tests, and which of them share a worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import (
    ALL,
    MODELS,
    REPO,
    SMALL,
    Engines,
    small_model,
)
from tests.e2e.interpreted import Interpreted
from tests.e2e.server import Server, serve


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Engines shared by all tests of this process."""
    made = Engines()
    yield made
    made.close()


@pytest.fixture(scope="session")
def v2() -> Iterator[Interpreted]:
    """Runs engines interpreted, under model runner V2."""
    process = Interpreted()
    yield process
    process.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose requests may set everything, and that cuts answers of more than 64 tokens."""
    log = tmp_path_factory.mktemp("generous") / "log.txt"
    config = {"allow": ALL, "decode_budget": 256, "decode_buffer": 64}
    with serve(small_model(), log, method="cake", budget=256, config=config) as running:
        yield running


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the default policy."""
    log = tmp_path_factory.mktemp("default") / "log.txt"
    options = ["--enable-prompt-tokens-details"]
    with serve(small_model(), log, method="cake", budget=256, options=options) as running:
        yield running


@pytest.fixture(autouse=True)
def _books_add_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: integrity on both sides, and no block missing from any pool."""
    if "engines" not in request.fixturenames:
        yield
        return
    engines = request.getfixturevalue("engines")
    engines.begin_test()
    yield
    for engine in engines:
        engine.check()


@pytest.fixture(scope="session")
def novel() -> str:
    """English prose."""
    file = min(Path(REPO / "scripts" / "data").glob("*.txt"))
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def prose(novel: str) -> list[int]:
    """Several thousand tokens of English prose for the small model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / SMALL)
    return list(tokenizer(novel)["input_ids"])


@pytest.fixture(scope="session")
def text(prose: list[int]) -> str:
    """About 900 tokens of it."""
    from transformers import AutoTokenizer

    decoded: str = AutoTokenizer.from_pretrained(MODELS / SMALL).decode(prose[:900])
    return decoded

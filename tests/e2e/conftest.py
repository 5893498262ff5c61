"""Fixtures of the engine tests, and which of them share a worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import ALL, REPO, Engines, small_model
from tests.e2e.interpreted import Interpreted
from tests.e2e.server import Server, Servers
from tests.support.inference_mode import WATCH
from tests.support.worker_groups import group_of

_ENGINES, _V2, _SERVERS = Engines(), Interpreted(), Servers()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let go of what a group of files has shared when the next test is another group's."""
    if nextitem is None or group_of(nextitem.nodeid) != group_of(item.nodeid):
        for shared in (_ENGINES, _V2, _SERVERS):
            shared.close()


@pytest.fixture(scope="session")
def engines() -> Engines:
    """Engines shared by the tests of a group of files."""
    return _ENGINES


@pytest.fixture(scope="session")
def v2() -> Interpreted:
    """Runs engines interpreted, under model runner V2."""
    return _V2


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server whose requests may set everything, and that cuts answers of more than 64 tokens."""
    config = {"allow": ALL, "decode_budget": 256, "decode_buffer": 64}
    return _SERVERS.get(tmp_path_factory, method="cake", budget=256, config=config)


@pytest.fixture
def strict(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server with the default policy."""
    options = ["--enable-prompt-tokens-details"]
    return _SERVERS.get(tmp_path_factory, method="cake", budget=256, options=options)


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
    assert WATCH.outside == set(), "ran outside of inference mode"


@pytest.fixture(scope="session")
def novel() -> str:
    """English prose."""
    file = min(Path(REPO / "scripts" / "data").glob("*.txt"))
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def prose(novel: str) -> list[int]:
    """Several thousand tokens of English prose for the small model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    return list(tokenizer(novel)["input_ids"])


@pytest.fixture(scope="session")
def text(prose: list[int]) -> str:
    """About 900 tokens of it."""
    from transformers import AutoTokenizer

    decoded: str = AutoTokenizer.from_pretrained(small_model()).decode(prose[:900])
    return decoded

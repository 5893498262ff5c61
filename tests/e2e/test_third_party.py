"""A method in a package of its own, as docs/adding-a-method.md writes it, on a real server."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from tests.e2e.harness import MODELS, REPO, SMALL, small_model
from tests.e2e.server import NAME, Server, serve
from vllm_kvcompress.tools.arguments import CommandError

pytestmark = pytest.mark.engine

BUDGET = 128
METHOD = "novelty"
PAGE = REPO / "docs" / "adding-a-method.md"
FILES = {"pyproject.toml", "kvc_novelty.py", "test_kvc_novelty.py"}

BRITTLE = '''
"""Another package's method, which fails at every request."""

from dataclasses import replace

from kvc_novelty import Novelty, NoveltyScorer


class BrittleScorer(NoveltyScorer):
    def score(self, layer):
        raise KeyError("oops")


BRITTLE = replace(Novelty, name="brittle", scorer=BrittleScorer)
'''


def code_blocks(page: str) -> dict[str, str]:
    """Files of a page: each a code block below a line with nothing but its name in backticks."""
    return dict(re.findall(r"^`([\w.-]+)`\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files, as the page has them."""
    folder = tmp_path_factory.mktemp("source")
    files = code_blocks(PAGE.read_text(encoding="utf-8"))
    assert set(files) == FILES
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the package and its metadata; the environment is left alone."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-index", "--disable-pip-version-check", "--target", str(target), str(source),
        ],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert any(target.glob("kvc_novelty-*.dist-info/entry_points.txt"))
    (target / "kvc_brittle.py").write_text(BRITTLE, encoding="utf-8")
    about = target / "kvc_brittle-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: kvc-brittle\nVersion: 0.1.0\n", encoding="utf-8")
    entry = "[vllm_kvcompress.methods]\nbrittle = kvc_brittle:BRITTLE\n"
    (about / "entry_points.txt").write_text(entry, encoding="utf-8")
    return target


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(installed: Path, *arguments: str, cwd: Path) -> str:
    """Output of a Python process that sees the package."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path_with(installed), "OMP_NUM_THREADS": "1"},
        cwd=cwd, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_its_own_tests_pass(source: Path, installed: Path) -> None:
    # Run beside the sources, as its author would.
    out = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".", cwd=source)
    assert "3 passed" in out


def test_it_is_known_by_its_entry_point_and_can_be_composed(
    installed: Path, tmp_path: Path
) -> None:
    program = (
        "from vllm_kvcompress.methods import available, get_method;"
        f"assert {METHOD!r} in available();"
        f"print(get_method('cake', {{'scorer': {METHOD!r}}}).name);"
        f"print(get_method('snapkv', {{'allocator': {METHOD!r}}}).name);"
        "import sys; print('vllm' in sys.modules)"
    )
    out = run(installed, "-c", program, cwd=tmp_path)
    assert out.split() == [f"{METHOD}+cake", f"snapkv+{METHOD}", "False"]


def quote(served: Server, prompt: str, **settings: Any) -> str:
    """A greedy answer."""
    answer = served.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=16, temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": settings},
    )  # fmt: skip
    return answer.choices[0].text


@pytest.fixture(scope="module")
def served(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the package's method and the whole model, whose layers tell spans apart."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    config = {"span": 4, "allow": {"method": True, "budget": True, "params": True}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path_with(installed))
        with serve(MODELS / SMALL, log, method=METHOD, budget=BUDGET, config=config) as server:
            yield server


def test_a_server_compresses_with_it(served: Server, text: str) -> None:
    first = quote(served, text)
    (facts,) = served.lines("KVCOMPRESS")
    assert facts["method"] == METHOD
    assert facts["blocks_after"] == BUDGET // 32
    assert sum(facts["tokens_per_layer"]) == BUDGET * 30
    assert len(set(facts["tokens_per_layer"])) > 1, "weights had no effect"
    assert quote(served, text) == first


def test_requests_set_its_parameters_and_compose_it(served: Server, text: str) -> None:
    asked = {"kv_compression": "cake", "kv_compression_config": f'{{"scorer": "{METHOD}"}}'}
    quote(served, text, **asked)
    assert served.lines("KVCOMPRESS")[-1]["method"] == f"{METHOD}+cake"
    before = served.lines("KVCOMPRESS")
    # A span that sees nothing but neighbours divides the layers differently.
    quote(served, text, kv_compression_config='{"span": 64}')
    own = next(facts for facts in before if facts["method"] == METHOD)
    assert served.lines("KVCOMPRESS")[-1]["method"] == METHOD
    assert served.lines("KVCOMPRESS")[-1]["tokens_per_layer"] != own["tokens_per_layer"]
    assert len(served.lines("KVCOMPRESS")) == len(before) + 1


def test_a_request_whose_method_fails_is_served_all_the_same(served: Server, text: str) -> None:
    expected = quote(served, text)
    with ThreadPoolExecutor() as pool:
        good = pool.submit(quote, served, text)
        failed = pool.submit(quote, served, text[40:], kv_compression="brittle")
        assert good.result() == expected
    assert failed.result()
    (facts,) = [facts for facts in served.lines("KVCOMPRESS") if "fallback" in facts]
    assert facts["fallback"] == "brittle: scoring layer 0 has raised KeyError: 'oops'"
    assert set(facts["tokens_per_layer"]) == {BUDGET}
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as page:
        shown = page.read().decode()
    assert re.search(r'kv_compression_fallbacks_total{.*method="brittle".*} 1\.0', shown)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"span": 0}', "novelty: span must be an integer of at least 1, got 0"),
        ('{"spam": 8}', "novelty: unknown parameter .*spam.*accepted are .*sinks, span, window"),
    ],
)
def test_a_wrong_parameter_of_a_request_is_a_400(
    served: Server, config: str, sentence: str
) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        quote(served, "Hello", kv_compression_config=config)


def test_a_wrong_parameter_of_the_server_refuses_the_start(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", path_with(installed))
    log = tmp_path / "log.txt"
    with (
        pytest.raises(CommandError, match="sinks must be an integer of at least 0, got -1"),
        serve(small_model(), log, method=METHOD, budget=BUDGET, config={"sinks": -1}),
    ):
        pass

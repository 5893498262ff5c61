"""``kvcompress inspect`` as a user starts it: two methods, one engine, all files."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.harness import LAYERS, kvcompress, small_model

pytestmark = pytest.mark.engine

HEADS, WINDOW = 3, 32
BUDGET, BLOCK = 128, 32
QUESTION = "Who spoke <first>?"


def inspect(*words: str, text: str) -> "subprocess.CompletedProcess[str]":
    given = ["--model", str(small_model()), "--input", "-", "--dtype", "float32"]
    return kvcompress("inspect", *given, *words, text=text)


@pytest.fixture(scope="module")
def text(novel: str) -> str:
    """About 600 tokens of prose."""
    return novel[:2000]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """The prefix of the files that a run of two methods wrote."""
    prefix = tmp_path_factory.mktemp("inspect") / "out"
    words = ["--compare", "cake,snapkv", "--budget", str(BUDGET), "--block-size", str(BLOCK)]
    words += ["--config", json.dumps({"snapkv": {"window": 16}}), "--question", QUESTION, "--raw"]
    done = inspect(*words, "--output", str(prefix), text=text)
    assert done.returncode == 0, done.stderr
    written = [f"{prefix}{suffix}" for suffix in (".png", ".html", ".npz")]
    assert done.stdout.splitlines()[-3:] == written
    return prefix


def test_layers_keep_what_the_budget_says(files: Path) -> None:
    raw = np.load(files.with_suffix(".npz"))
    tokens = raw["token_ids"].size
    assert 500 < tokens < 800
    meta = json.loads(str(raw["meta"]))
    runs = [(run["method"], run["window"], run["block_size"]) for run in meta["runs"]]
    assert runs == [("cake", WINDOW, BLOCK), ("snapkv", 16, BLOCK)]
    for number, (_, window, _) in enumerate(runs):
        lengths, kept = raw[f"{number}_lengths"], raw[f"{number}_kept"]
        assert lengths.shape == (LAYERS,)
        assert lengths.sum() == LAYERS * BUDGET == kept.shape[1]
        for layer in np.split(kept, np.cumsum(lengths)[:-1], axis=1):
            assert layer.shape[0] == HEADS
            assert (np.diff(layer, axis=1) > 0).all()
            assert (layer[:, -window:] == np.arange(tokens - window, tokens)).all()
    assert len(set(raw["0_lengths"].tolist())) > 3
    assert set(raw["1_lengths"].tolist()) == {BUDGET}
    # The layer with the largest preference keeps most.
    assert raw["0_weights"].sum() == pytest.approx(1)
    assert raw["0_lengths"][raw["0_weights"].argmax()] == raw["0_lengths"].max()
    product = np.exp(raw["0_log_entropy"] / 1.5 + raw["0_log_shift"] / 0.6)
    assert raw["0_weights"] == pytest.approx(product / product.sum(), rel=1e-5)
    assert (raw["0_kept"] != raw["1_kept"]).any()


def test_files_show_the_prompt(files: Path, text: str) -> None:
    from PIL import Image

    from tests.tools.test_inspection_page import Parsed

    shown = Parsed(files.with_suffix(".html").read_text(encoding="utf-8"))
    assert "".join(shown.tokens) == f"{text.rstrip()}\n\n{QUESTION}"
    titles = [run["title"] for run in json.loads(shown.scripts["data"])["runs"]]
    assert [title.split(":")[0] for title in titles] == ["cake", "snapkv"]
    with Image.open(files.with_suffix(".png")) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800


def test_what_is_kept_whole_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    done = inspect("--budget", "256", "--output", str(tmp_path / "a"), text="word " * 100)
    assert done.returncode == 2
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("kvcompress inspect")]
    assert "tokens fits --budget 256 and is kept whole" in last
    assert list(tmp_path.iterdir()) == []

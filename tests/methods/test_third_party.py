"""Methods of other packages: what is wrong with an entry point is said in one sentence."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from tests.support.layers import random_layer
from vllm_kvcompress.methods import available, get_method, registry

GOOD = """
from dataclasses import dataclass

import torch

from vllm_kvcompress.methods import EqualShares, MethodSpec, Scorer


@dataclass(frozen=True, kw_only=True)
class Latest(Scorer):
    luck: int = 1

    def score(self, layer):
        return torch.arange(layer.history).float().expand(layer.num_kv_heads, -1)


Guess = MethodSpec(name="guess", scorer=Latest, api=1)
"""
METADATA = "Metadata-Version: 2.1\nName: kvc-guess\nVersion: 1.0\n"


@dataclass
class Package:
    """A package on the path, with one entry point, that is not installed anywhere."""

    folder: Path

    def write(self, code: str, entry: str = "guess = kvc_guess:Guess") -> None:
        """Write its module and its metadata."""
        (self.folder / "kvc_guess.py").write_text(code, encoding="utf-8")
        info = self.folder / "kvc_guess-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA, encoding="utf-8")
        lines = f"[{registry.ENTRY_POINT_GROUP}]\n{entry}\n"
        (info / "entry_points.txt").write_text(lines, encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Registry and modules are afterwards what they were."""
    available()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.syspath_prepend(tmp_path)
    registry._load_third_party.cache_clear()
    yield Package(tmp_path)
    sys.modules.pop("kvc_guess", None)
    registry._load_third_party.cache_clear()


def refusal(*names: str) -> str:
    """What every use of the registry says; one sentence that names the entry point."""
    with pytest.raises(ValueError, match=r"^entry point ") as caught:
        available()
    # Not only the first time: nothing may be half known.
    with pytest.raises(ValueError, match=r"^entry point "):
        get_method("cake", {})
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    assert [name for name in ("of kvc-guess", *names) if name not in text] == []
    return text


def test_a_method_is_found_by_its_own_name(package: Package) -> None:
    assert "guess" not in available()
    package.write(GOOD, "called-otherwise = kvc_guess:Guess")
    registry._load_third_party.cache_clear()
    assert "guess" in available()
    assert "called-otherwise" not in available()
    method = get_method("guess", {"luck": 2, "window": 8})
    assert method.name == "guess"
    scores = method.score(random_layer(method, tokens=120))
    assert method.select(scores, 2).tolist() == [[110, 111]] * 2
    assert method.allocator.layers_per_division == 0
    assert method.weights([], base=1, num_layers=1).shape == (0,)
    with pytest.raises(ValueError, match=r'^guess: unknown parameter "lucky", accepted are .*luck'):
        get_method("guess", {"lucky": 2})


def test_registering_in_the_module_too_is_harmless(package: Package) -> None:
    package.write(GOOD + "\nfrom vllm_kvcompress.methods import register\nregister(Guess)\n")
    assert "guess" in available()


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def", "SyntaxError"),
        ("", "AttributeError"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded(package: Package, code: str, cause: str) -> None:
    package.write(code)
    refusal('"guess = kvc_guess:Guess"', "cannot be loaded", cause, "repair or uninstall kvc-guess")


def test_a_module_that_is_not_there(package: Package) -> None:
    package.write(GOOD, "guess = kvc_gone:Guess")
    refusal('"guess = kvc_gone:Guess"', "cannot be loaded", "No module named 'kvc_gone'")


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("Guess = 3", "got 3"),
        ("class Guess: pass", "got <class 'kvc_guess.Guess'>"),
        (GOOD + "\nGuess = Guess()", "got Method(name='guess', scorer=Latest(window=32, luck=1)"),
    ],
    ids=["number", "class", "built"],
)
def test_an_entry_point_that_is_no_method(package: Package, code: str, shown: str) -> None:
    package.write(code)
    refusal("must be a vllm_kvcompress.methods.MethodSpec (method API 1)", shown)


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("def score", "def rank", "guess: its scorer must be a complete sub-class of Scorer, got"),
        ("scorer=Latest", "scorer=int", "guess: its scorer must be a complete sub-class of Scorer"),
        ("api=1", "api=1, allocator=Latest", "its allocator must be a complete sub-class of Alloc"),
        ('"guess"', "3", "the name of a method must be a string, got 3"),
        (
            "luck: int",
            "needs = 3; luck: int",
            "needs of its scorer must be a frozenset, got 3",
        ),
        (" = 1\n", "\n", "guess: the parameter luck needs a default"),
        ("luck", "scorer", "guess: the parameter name scorer is reserved"),
        (", api=1", "", "guess is written for method API None, and here it is 1: adapt it as docs"),
        ("api=1", "api=2", "guess is written for method API 2, and here it is 1"),
    ],
)
def test_a_method_that_is_not_usable(package: Package, old: str, new: str, shown: str) -> None:
    package.write(GOOD.replace(old, new))
    refusal("is refused", shown)


@pytest.mark.parametrize("taken", ["cake", "none", "scatter"])
def test_a_built_in_name_cannot_be_taken_over(package: Package, taken: str) -> None:
    package.write(GOOD.replace('"guess"', f'"{taken}"'))
    text = refusal(f'the method name "{taken}" is taken by vllm_kvcompress.methods.')
    assert '"guess = kvc_guess:Guess"' in text
    assert registry._methods[taken].scorer.__name__ != "Latest"


def test_an_entry_point_without_a_package_is_named_all_the_same(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("guess", "kvc_guess:Guess", registry.ENTRY_POINT_GROUP)

    def found(**_: Any) -> EntryPoints:
        return EntryPoints([entry])

    monkeypatch.setattr(registry, "entry_points", found)
    with pytest.raises(ValueError, match=r'^entry point "guess = kvc_guess:Guess" of its package '):
        available()

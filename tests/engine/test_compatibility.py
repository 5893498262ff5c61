"""docs/compatibility.md: tests that it names exist, and the code says the sentences it quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import CUDAGraphMode, KVTransferConfig, ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from tests.support.refusals import (
    BERT,
    CHUNKED,
    GEMMA3,
    GEMMA3N,
    JAMBA,
    MAMBA,
    MLA,
    MOSTLY_FULL,
    SHAPE,
    WHISPER,
    Layer,
    gpu_config,
    plain_config,
    refused_layer,
    start,
)
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUImpl
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.requests import check_request
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
WORKS, REFUSED, UNTESTED = "✅", "❌", "⬜"


@dataclass(frozen=True)
class Row:
    """One line of the page's tables."""

    feature: str
    state: str
    evidence: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """File and name of every test that is named."""
        return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", self.evidence)

    @property
    def quote(self) -> str:
        """What the evidence begins with, if that is in backticks."""
        found = re.match(r"`([^`]+)`", self.evidence)
        return found[1] if found else ""


def rows() -> list[Row]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|") and not line.startswith(("| feature |", "| --- |"))
    ]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return [Row(*row) for row in cells]


@cache
def functions(path: str) -> frozenset[str]:
    """Names of the tests of a file, which is read and not run."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature[:40])
def test_a_row_has_a_state_and_what_shows_it(row: Row) -> None:
    assert row.state in (WORKS, REFUSED, UNTESTED)
    named = re.findall(r"tests/[\w/.]+", row.evidence)
    assert len(named) == len(row.tests), "tests are named as `path::name`"
    missing = [f"{path}::{name}" for path, name in row.tests if name not in functions(path)]
    assert missing == []
    assert row.tests or row.state != WORKS
    assert row.quote or row.state != REFUSED


def test_no_feature_is_listed_twice() -> None:
    features = [row.feature for row in rows()]
    assert len(features) == len(set(features))


# --- sentences -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return tmp_path_factory.mktemp("models")


class Said:
    """Sentences that were said, and which of the rules for whole configurations said them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sentences: set[str] = set()
        self.rules: set[int] = set()
        self.all_rules = 0
        original = checks._rules

        def recording(config: VllmConfig) -> list[tuple[bool, str, str]]:
            found = original(config)
            self.all_rules = max(self.all_rules, len(found))
            self.rules.update([i for i, (applies, _, _) in enumerate(found) if applies][:1])
            return found

        monkeypatch.setattr(checks, "_rules", recording)

    def note(self, call: Callable[[], object]) -> None:
        """Call what refuses."""
        with pytest.raises((ValueError, VLLMValidationError)) as caught:
            call()
        self.sentences.add(str(caught.value))


def say_of_configs(said: Said, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Models and options, as a user gives them."""
    for model in (MLA, MAMBA, JAMBA, WHISPER, GEMMA3N, MOSTLY_FULL, CHUNKED, BERT):
        said.note(partial(start, root, model=model))
    options: list[dict[str, Any]] = [
        {
            "kv_transfer_config": KVTransferConfig(
                kv_connector="ExampleConnector", kv_role="kv_both"
            )
        },
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"tensor_parallel_size": 2},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"attention_backend": "FLASHINFER"},
        {"worker_cls": "my.Worker"},
        {"scheduler_cls": "my.Scheduler"},
        {"model": GEMMA3, "disable_hybrid_kv_cache_manager": True},
        {"model": GEMMA3, "settings": {"method": "cake", "prefill": "cascade"}},
    ]
    for given in options:
        said.note(partial(start, root, **given))
    with patch.context() as other:
        other.setattr(vllm, "__version__", "0.31.2")
        said.note(lambda: start(root))
    with patch.context() as other:
        other.setattr(ModelConfig, "is_mm_prefix_lm", property(lambda _: True))
        said.note(lambda: start(root))


def say_of_devices(said: Said, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Settings that vLLM itself refuses on this machine, in finished configurations."""
    config = plain_config(root)
    config.parallel_config.decode_context_parallel_size = 2
    said.note(lambda: checks.check_config(config))
    with patch.context() as gpu:
        config = gpu_config(root, gpu)
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
        said.note(lambda: checks.check_config(config))
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.parallel_config.enable_dbo = True
        said.note(lambda: checks.check_config(config))
        gpu.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        said.note(lambda: checks.check_config(config))


def layer_with(**facts: Any) -> Layer:
    """An attention layer that has these facts."""
    layer = Layer()
    for name, value in facts.items():
        setattr(layer.impl, name, value)
    return layer


def say_of_layers(said: Said) -> None:
    same = ArenaSpec(**SHAPE)
    said.sentences |= {
        str(refused_layer(same, Layer(object))),
        str(refused_layer(same, layer_with(kv_cache_dtype="fp8"))),
        str(refused_layer(same, layer_with(alibi_slopes=torch.ones(4)))),
        str(refused_layer(same, layer_with(num_heads=8))),
        str(refused_layer(ArenaSpec(**SHAPE, non_causal=True))),
        str(refused_layer(SlidingWindowSpec(**{**SHAPE, "head_size": 128}, sliding_window=128))),
        str(refused_layer(ArenaSpec(**{**SHAPE, "head_size": 128}))),
    }
    alone: dict[str, KVCacheSpec] = {"layers.0": SlidingWindowSpec(**SHAPE, sliding_window=128)}
    said.note(lambda: checks.check_specs(alone, {"layers.0": Layer()}, ArenaCPUImpl))


def say_of_requests(said: Said, root: Path) -> None:
    said.note(lambda: check_request(SimpleNamespace(resumable=True), None))
    config = start(root, settings={"method": "uniform", "budget": 400}, block_size=100)
    config.cache_config.num_gpu_blocks = 9  # one of them is the null block
    request = SimpleNamespace(
        resumable=False,
        prompt_token_ids=[0] * 400,
        sampling_params=SimpleNamespace(extra_args=None, max_tokens=900),
    )
    config.model_config.max_model_len = 2000
    said.note(lambda: check_request(request, SimpleNamespace(vllm_config=config)))


def test_the_code_says_what_is_quoted_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Said(monkeypatch)
    say_of_configs(said, root, monkeypatch)
    say_of_devices(said, root, monkeypatch)
    say_of_layers(said)
    say_of_requests(said, root)
    unheard = set(range(said.all_rules)) - said.rules
    assert unheard == set(), "a rule of checks.py has no line here and none on the page"
    quoted = {row.quote for row in rows() if row.state == REFUSED}
    assert quoted - said.sentences == set(), "quoted, but nothing says so"
    assert said.sentences - quoted == set(), "said, but not on the page"

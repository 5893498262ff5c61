"""Which attention backend a GPU gets: vLLM's own selection, with a capability that it is told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support.compatibility_page import backend_table
from tests.support.fake_cuda import become_cuda, have_flashinfer
from tests.support.refusals import gpu_config
from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.attention import backend_choice
from vllm_kvcompress.engine.attention.common import ArenaImpl
from vllm_kvcompress.engine.hooks import differences
from vllm_kvcompress.engine.plugin import switch_on
from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker
from vllm_kvcompress.engine.worker_hook_table import WORKER_HOOKS

HEADS = (64, 80, 96, 128, 192, 256, 512)
GPUS = {
    "7.5": (7, 5),
    "8.0": (8, 0),
    "8.6": (8, 6),
    "8.9": (8, 9),
    "9.0": (9, 0),
    "10.0": (10, 0),
    "12.0": (12, 0),
}
KINDS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "FP8 cache": {"cache_dtype": "fp8"},
    "sinks": {"sinks": True},
    "FP8 cache and sinks": {"cache_dtype": "fp8", "sinks": True},
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Forget the backends that were put in place, and what was chosen."""
    overrides = dict(registry._ATTN_OVERRIDES)
    original = selector._cached_get_attn_backend
    marks = vars(selector).get("_kv_compression_wrapped")
    yield
    registry._ATTN_OVERRIDES.clear()
    registry._ATTN_OVERRIDES.update(overrides)
    selector._cached_get_attn_backend = original
    if marks is None:
        vars(selector).pop("_kv_compression_wrapped", None)
    original.cache_clear()


class Loading:
    """vLLM's part of a worker that loads a model of one attention layer."""

    vllm_config: VllmConfig
    sinks: bool
    head_size: int
    layer: Attention

    def load_model(self) -> None:
        config = self.vllm_config
        config.compilation_config.static_forward_context.clear()
        before = torch.get_default_dtype()
        torch.set_default_dtype(config.model_config.dtype)
        extra = {"sinks": torch.zeros(4)} if self.sinks else {}
        try:
            with set_current_vllm_config(config):
                self.layer = Attention(
                    4,
                    self.head_size,
                    1.0,
                    2,
                    cache_config=config.cache_config,
                    prefix="layers.0",
                    **extra,
                )
        finally:
            torch.set_default_dtype(before)


class LoadingWorker(ArenaWorker, Loading):
    """Our worker around it."""


def load(
    config: VllmConfig,
    *,
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: Any = "auto",
    sinks: bool = False,
    worker_cls: type[Loading] = LoadingWorker,
) -> Attention:
    """Make a layer as a worker does when it loads a model; weights would come after that."""
    config.model_config.dtype = dtype
    config.cache_config.cache_dtype = cache_dtype
    worker = worker_cls()
    worker.vllm_config, worker.head_size, worker.sinks = config, head_size, sinks
    worker.load_model()
    return worker.layer


@pytest.fixture
def config(root: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    return gpu_config(root, monkeypatch)


def served(config: VllmConfig, capability: tuple[int, int], kind: str, head_size: int) -> str:
    """One cell of the page's table."""
    given = dict(KINDS[kind])
    # Before 8.0 there is no bfloat16.
    given.setdefault("dtype", torch.bfloat16 if capability[0] > 7 else torch.float16)
    if given["dtype"] not in platforms.current_platform.supported_dtypes:
        return "not vLLM"
    try:
        layer = load(config, head_size=head_size, **given)
    except checks.Unsupported:
        return "refused"
    assert isinstance(layer.impl, ArenaImpl)
    return layer.attn_backend.get_name()


def test_the_page_says_what_vllm_chooses(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a FlashInfer that would take every layer."""
    have_flashinfer(monkeypatch)
    columns: dict[str, dict[tuple[str, int], str]] = {}
    for name, capability in GPUS.items():
        become_cuda(monkeypatch, capability)
        columns[name] = {
            (kind, head): served(config, capability, kind, head) for kind in KINDS for head in HEADS
        }
    lines = [["layer", "head size", *GPUS]]
    for kind in KINDS:

        def row(head: int, kind: str = kind) -> list[str]:
            return [columns[name][kind, head] for name in GPUS]

        for cells, heads in groupby(HEADS, row):
            lines.append([kind, ", ".join(map(str, heads)), *cells])
    page = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    assert backend_table() == lines, f"docs/compatibility.md should have\n{page}"


def test_the_cuda_platform_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    become_cuda(monkeypatch, (9, 0))
    module = "vllm.platforms.cuda"
    assert list(differences({module: WORKER_HOOKS[module]})) == []


@pytest.mark.parametrize(
    ("capability", "options", "ours"),
    [
        ((10, 0), {}, "FLASH_ATTN"),
        ((10, 0), {"sinks": True, "head_size": 64}, "FLASH_ATTN"),
        ((8, 9), {"cache_dtype": "fp8"}, "TRITON_ATTN"),
        ((12, 0), {"cache_dtype": "fp8"}, "TRITON_ATTN"),
        ((12, 0), {"sinks": True, "head_size": 64}, "TRITON_ATTN"),
    ],
)
def test_a_wrapped_backend_in_place_of_flashinfer(
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    options: dict[str, Any],
    ours: str,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        backend_choice.logger, "info_once", lambda text, *args: said.append(text % args)
    )
    become_cuda(monkeypatch, capability)
    have_flashinfer(monkeypatch)
    layer = load(config, **options)
    assert layer.attn_backend.get_name() == ours
    assert isinstance(layer.impl, ArenaImpl)
    start = f"Attention backend {ours} in place of FLASHINFER, vLLM's choice for this GPU"
    assert said == [f"{start}, which does not work with --kv-compression"]


def test_other_engines_of_the_process_have_vllms_choice(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_cuda(monkeypatch, (10, 0))
    have_flashinfer(monkeypatch)
    assert load(config).attn_backend.get_name() == "FLASH_ATTN"
    config.additional_config = {}
    with pytest.raises(NotImplementedError):  # the stand-in has no attention
        load(config, worker_cls=Loading)


def test_a_choice_by_hand_is_vllms_to_judge(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_cuda(monkeypatch, (9, 0))
    config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    assert load(config).attn_backend.get_name() == "TRITON_ATTN"


@pytest.mark.parametrize("in_worker", [False, True])
def test_what_no_backend_serves_is_refused_before_weights_are_loaded(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, in_worker: bool
) -> None:
    become_cuda(monkeypatch, (8, 0))
    have_flashinfer(monkeypatch)
    config.cache_config.cache_dtype = "fp8"
    with pytest.raises(checks.Unsupported) as caught:
        load(config, cache_dtype="fp8") if in_worker else switch_on(config)
    assert str(caught.value) == (
        "a KV cache of dtype fp8 on a GPU of compute capability 8.0 is not supported with "
        "--kv-compression; set --kv-cache-dtype to bfloat16"
    )
    config.cache_config.cache_dtype = "bfloat16"
    load(config, cache_dtype="bfloat16") if in_worker else switch_on(config)


def test_a_block_size_that_no_backend_has_is_named(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_cuda(monkeypatch, (9, 0))
    config.cache_config.block_size, config.cache_config.user_specified_block_size = 8, True
    with pytest.raises(
        checks.Unsupported, match=r"a block size of 8 .*; set --block-size to a multiple of 16$"
    ):
        switch_on(config)


def test_a_process_without_a_gpu_leaves_it_to_the_worker(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_cuda(monkeypatch, (8, 0))
    config.cache_config.cache_dtype = "fp8"
    platform = type(platforms.current_platform)
    monkeypatch.setattr(platform, "get_device_capability", classmethod(lambda cls: None))
    backend_choice.check_backends(config)

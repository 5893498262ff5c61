"""vLLM's compile cache sees that compression is on, not how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.compilation import backends, caching
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.engine.compile_cache import share_compiled_models
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.settings import compression_of

SETTINGS: list[dict[str, Any]] = [
    {"method": "cake", "budget": 256},
    {"method": "cake", "budget": 512, "gamma": 100, "log_requests": True},
    {"method": "none"},
]


@pytest.fixture
def configs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[VllmConfig]:
    """Plain vLLM's, then one for each of SETTINGS; the cache is wrapped as a worker does it."""
    owners: tuple[tuple[Any, str], ...] = (
        (caching, "aot_compile_hash_factors"),
        (backends.VllmBackend, "__call__"),
    )
    for owner, name in owners:
        monkeypatch.setattr(owner, name, vars(owner)[name])
        # An engine of this process may have wrapped it before.
        monkeypatch.setattr(owner, "_kv_compression_wrapped", frozenset(), raising=False)
    register()
    options: dict[str, Any] = {"skip_tokenizer_init": True, "load_format": "dummy"}
    extras = [{}, *({"kv_compression": settings} for settings in SETTINGS)]
    return [
        EngineArgs(model=str(folder), additional_config=extra, **options).create_engine_config()
        for extra in extras
    ]


def test_two_settings_have_one_hash_and_plain_vllm_another(configs: list[VllmConfig]) -> None:
    share_compiled_models()
    plain, *others = [caching.aot_compile_hash_factors(config) for config in configs]
    assert others == [others[0]] * len(SETTINGS)
    assert plain != others[0]
    # A memory plan is stored under the config's own hash, and memory differs between settings.
    assert len({config.compute_hash() for config in configs}) == len(configs)


def test_the_compiler_hashes_alike_and_sees_everything_else(
    configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compile_graph(self: Any, graph: Any, example_inputs: Any) -> str:
        seen.append((self.vllm_config.compute_hash(), self.vllm_config.compilation_config))
        return "compiled"

    monkeypatch.setattr(backends.VllmBackend, "__call__", compile_graph)
    share_compiled_models()
    for config in configs:
        backend = backends.VllmBackend.__new__(backends.VllmBackend)
        backend.vllm_config = config
        assert backend(None, []) == "compiled"
        assert backend.vllm_config is config
    plain, *others = [found for found, _ in seen]
    assert others == [others[0]] * len(SETTINGS)
    assert plain != others[0]
    assert all(
        own is config.compilation_config for (_, own), config in zip(seen, configs, strict=True)
    )
    assert [compression_of(config) is not None for config in configs] == [False, True, True, True]


def test_the_key_of_the_other_settings_stays(configs: list[VllmConfig]) -> None:
    share_compiled_models()
    _, config, *_ = configs
    before = caching.aot_compile_hash_factors(config)
    config.additional_config["gdn_prefill_backend"] = "triton"
    assert caching.aot_compile_hash_factors(config) != before

"""Real engines for tests: made once per settings, stepped by hand, inspected from inside."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cut_model import first_layers
from tests.e2e.engine import Engine
from tests.support.inference_mode import WATCH

REPO = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("KVC_TEST_MODELS", REPO / "models"))
SMALL = "smollm2-135m-instruct"
QUALITY = "qwen2.5-coder-0.5b-instruct"
HYBRID = "gemma-3-270m"

LAYERS = 6
"""Layers of the model that engines have unless told otherwise: the first ones of SMALL."""

ALL = {"method": True, "budget": {"min": 1}, "params": True, "keep": True, "decode": True}
"""An ``allow`` that lets requests set everything."""

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": 256 << 20,
}


def page_bytes(layers: int = LAYERS) -> int:
    """Bytes of one block of the small model in fp32: layers x heads x tokens x keys and values."""
    return layers * 3 * int(DEFAULTS["block_size"]) * 128 * 4


def small_model() -> Path:
    """Folder of the model that engines have unless told otherwise."""
    return first_layers(MODELS / SMALL, LAYERS)


def hybrid_model() -> Path:
    """Folder of the sliding-window hybrid, all its layers; its tokenizer is left whole."""
    return first_layers(MODELS / HYBRID, 18, cut_tokenizer=False)


def kvcompress(*words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run our command line as a user does.

    Args:
        words: Behind ``kvcompress``.
        text: What is typed in.

    """
    return subprocess.run(
        [sys.executable, "-m", "vllm_kvcompress.tools.cli", *words],
        input=text,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Engines:
    """Engines by their settings, those used last.

    Args:
        memory: Bytes that all of them together may take, about.

    """

    def __init__(self, memory: int = 4 << 30) -> None:
        self._memory = memory
        self._made: dict[str, tuple[Engine, int]] = {}
        self._in_use: set[str] = set()

    def __iter__(self) -> Iterator[Engine]:
        """Those that the running test has asked for."""
        return iter([engine for key, (engine, _) in self._made.items() if key in self._in_use])

    def begin_test(self) -> None:
        """Note that from now on another test asks."""
        self._in_use.clear()

    def close(self) -> None:
        """Shut all engines down and let go of their memory."""
        while self._made:
            self._close(next(iter(self._made)))

    def _close(self, key: str) -> None:
        engine, _ = self._made.pop(key)
        # vLLM would collect twice, a second each time, while the engine is still referred to.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "collect", lambda: 0)
            engine.llm.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()

    def get(
        self,
        method: str | None = None,
        budget: int | float | None = None,
        *,
        model: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Engine:
        """Return the engine with these settings; every compressed one checks each step.

        Args:
            method: None for plain vLLM.
            budget: As for the LLM.
            model: A folder, or the name of one under models/; None for :func:`small_model`.
            config: Method parameters.
            settings: vLLM's engine arguments beside :data:`DEFAULTS`.

        """
        path = MODELS / (model or small_model())
        compression: dict[str, Any] = {}
        if method is not None:
            compression = {
                "kv_compression": method,
                "kv_compression_budget": budget,
                "kv_compression_config": {"check_integrity": True, **(config or {})},
            }
        wanted = {"model": str(path), **compression, **DEFAULTS, **settings}
        key = repr(sorted(wanted.items()))
        if key in self._made:
            self._made[key] = self._made.pop(key)  # the last one is the one used last
        else:
            if not path.is_dir():
                raise FileNotFoundError(f"{path} is missing: run scripts/fetch_model.py {model}")
            size = memory_of(path, wanted)
            while self._made and size + sum(n for _, n in self._made.values()) > self._memory:
                self._close(next(iter(self._made)))
            from tests.support import poisoned_pool  # noqa: F401 - of all engines from now on
            from vllm_kvcompress import LLM

            WATCH.install()
            self._made[key] = Engine(LLM(**wanted), compressed=method is not None), size
        engine, _ = self._made[key]
        if key not in self._in_use:
            self._in_use.add(key)
            engine.begin_test()
        return engine

    def limited(self) -> Engine:
        """Return an engine that cuts what is generated back to 128 tokens, 32 at a time."""
        config = {"decode_budget": 128, "decode_buffer": 32, "allow": ALL}
        return self.get("cake", 128, config=config)

    def open(self, **settings: Any) -> Engine:
        """Return an engine of CAKE and 256 tokens per layer whose requests may set everything."""
        config = {"allow": ALL, **settings.pop("config", {})}
        return self.get("cake", 256, config=config, **settings)


def memory_of(model: Path, settings: Mapping[str, Any]) -> int:
    """Bytes that an engine takes, about: fp32 is twice what lies in the file, and is packed too."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return 3 * weights + int(settings["kv_cache_memory_bytes"]) + (100 << 20)

"""One compiled model for all settings of compression.

vLLM finds a compiled model again by a hash of its configuration, our settings included, and would
compile for minutes whenever a budget changes. What is compiled does not depend on them: attention
is left out of it. That compression is on still counts: plain vLLM's graph may hold the cache update
that our backends do inside attention.
"""

import copy
from typing import Any

from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.planning.config import CONFIG_KEY


def share_compiled_models() -> None:
    """Let vLLM's compile cache see that compression is on, not how. Idempotent."""
    from vllm.compilation import backends, caching

    wrap_once(caching, "aot_compile_hash_factors", _of_config)
    wrap_once(backends.VllmBackend, "__call__", _of_backend)


def without_settings(vllm_config: Any) -> Any:
    """Return a config that is hashed alike for all settings; itself where compression is off."""
    extra = vllm_config.additional_config
    if not isinstance(extra, dict) or extra.get(CONFIG_KEY) is None:
        return vllm_config
    same = copy.copy(vllm_config)
    same.additional_config = {**extra, CONFIG_KEY: "on"}
    return same


def _of_config(original: Any) -> Any:
    def aot_compile_hash_factors(vllm_config: Any) -> Any:
        return original(without_settings(vllm_config))

    return aot_compile_hash_factors


def _of_backend(original: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # It hashes its own config, and hands it on to parts that read everything else in it.
        whole = self.vllm_config
        self.vllm_config = without_settings(whole)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.vllm_config = whole

    return __call__

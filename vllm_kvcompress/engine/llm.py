"""Offline inference with compression."""

from typing import Any

import vllm

from vllm_kvcompress.engine.plugin import merge_settings, register


class LLM(vllm.LLM):
    """``vllm.LLM`` with three more keyword arguments.

    Args:
        model: As for ``vllm.LLM``; so are all other arguments.
        kv_compression: Name of a method; None leaves compression off.
        kv_compression_budget: Tokens each layer keeps on average, window included (int), or
            that number as a share of the prompt in (0, 1) (float). Default 1024.
        kv_compression_config: Parameters of the method and engine options.

    Raises:
        ValueError: One sentence that names the wrong setting.

    """

    def __init__(
        self,
        model: str,
        *args: Any,
        kv_compression: str | None = None,
        kv_compression_budget: int | float | None = None,
        kv_compression_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Also where the package is on the path without being installed.
        register()
        kwargs["additional_config"] = merge_settings(
            kwargs.get("additional_config"),
            kv_compression,
            kv_compression_budget,
            kv_compression_config,
        )
        super().__init__(model, *args, **kwargs)

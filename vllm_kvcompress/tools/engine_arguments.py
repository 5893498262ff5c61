"""What sub-commands give to vLLM's engine, and what it refuses."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.tools.arguments import CommandError


def llm_arguments(config: KVCompressionConfig, **more: Any) -> dict[str, Any]:
    """Return keyword arguments of ``vllm_kvcompress.LLM`` for a compression.

    Args:
        config: The compression.
        **more: Further settings of --kv-compression-config.

    """
    settings = {**config.as_dict(), **more}
    arguments = {
        "kv_compression": settings.pop("method"),
        "kv_compression_budget": settings.pop("budget"),
    }
    return {**arguments, "kv_compression_config": settings} if settings else arguments


def check_engine_arguments(names: Iterable[str]) -> None:
    """Refuse what vLLM's engine does not take. Imports vLLM.

    Raises:
        CommandError: vLLM does not know one of them.

    """
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name in names:
        if name not in known:
            raise CommandError(f"--engine-args: vLLM has no argument {name!r}")


def sentence(error: Exception) -> str:
    """Return what an error of vLLM says; of pydantic's many lines, what the first check said."""
    details = getattr(error, "errors", None)
    if not callable(details):
        return str(error)
    return str(details()[0]["msg"]).removeprefix("Value error, ")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError, by which vLLM and the plugin refuse settings, into a CommandError.

    Raises:
        CommandError: With the :func:`sentence` of the error.

    """
    try:
        yield
    except ValueError as error:
        raise CommandError(sentence(error)) from error

"""Entry point ``vllm.general_plugins``: the flags, and switching compression on when asked."""

import argparse
import functools
import json
from typing import Any

from vllm_kvcompress.engine.command_line import ends_command, mark_from_words
from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.planning.config import (
    CONFIG_KEY,
    DEFAULT_BUDGET,
    KVCompressionConfig,
    parse_budget,
)
from vllm_kvcompress.planning.setting_names import check_names

_FLAGS = ("kv_compression", "kv_compression_budget", "kv_compression_config")
"""Names of the flags among parsed arguments."""


def register() -> None:
    """Add the flags to vLLM's. Idempotent; nothing else changes unless one of them is used."""
    from vllm.engine.arg_utils import EngineArgs

    wrap_once(EngineArgs, "add_cli_args", _add_flags)
    wrap_once(EngineArgs, "from_cli_args", _read_flags)
    wrap_once(EngineArgs, "create_engine_config", _switch_on_when_asked)


def merge_settings(
    additional_config: Any, method: str | None, budget: Any, params: dict[str, Any] | None
) -> dict[str, Any]:
    """Add the settings of flags or keyword arguments to additional_config.

    Args:
        additional_config: The user's value of vLLM's option of that name; not changed.
        method: Name of a method; None if no flag names one.
        budget: Tokens per layer or share of the prompt; None for the default.
        params: Method parameters and engine options.

    Returns:
        The new value of additional_config.

    Raises:
        ValueError: There are settings but no method, a setting is given twice, or one is wrong.

    """
    extra = dict(additional_config or {})
    if method is None:
        if budget is not None or params is not None:
            raise ValueError(
                "--kv-compression-budget and --kv-compression-config need --kv-compression METHOD"
            )
        return extra
    if CONFIG_KEY in extra:
        raise ValueError(
            f"{CONFIG_KEY} is set twice; use either --kv-compression or --additional-config"
        )
    for name in ("method", "budget"):
        if name in (params or {}):
            raise ValueError(f"{name} does not belong in --kv-compression-config; it has a flag")
    settings = {
        **(params or {}),
        "method": method,
        "budget": DEFAULT_BUDGET if budget is None else budget,
    }
    extra[CONFIG_KEY] = KVCompressionConfig.parse(settings).as_dict()
    return extra


def switch_on(vllm_config: Any) -> None:
    """Name our worker and scheduler in the config. Mutates vllm_config.

    Args:
        vllm_config: The finished configuration.

    Raises:
        ValueError: The combination of settings is not supported, or the budget is too small for
            the block size.

    """
    # Imported here: a vLLM without some hook must still serve those who did not ask.
    from vllm_kvcompress.engine.attention.backend_choice import check_backends
    from vllm_kvcompress.engine.checks import WORKERS, check_config
    from vllm_kvcompress.engine.metrics import register_metrics
    from vllm_kvcompress.engine.requests import guard_requests
    from vllm_kvcompress.engine.settings import resolver_of

    check_config(vllm_config)
    check_backends(vllm_config)
    if vllm_config.cache_config.block_size:
        resolver_of(vllm_config, vllm_config.cache_config.block_size)
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = (
        "vllm_kvcompress.engine.scheduler.arena_scheduler."
        + ("ArenaAsyncScheduler" if asynchronous else "ArenaScheduler")
    )
    guard_requests()
    register_metrics()


def _add_flags(original: Any) -> Any:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="KVCompression",
            description="KV-cache compression after prefill (vllm_kvcompress).",
        )
        group.add_argument(
            "--kv-compression",
            metavar="METHOD",
            default=argparse.SUPPRESS,
            help="Evict KV-cache tokens after prefill by this method and free their blocks: "
            "cake, dynamickv, snapkv, another of docs/methods, or a third party's; none: only "
            "requests that ask for it are compressed.",
        )
        group.add_argument(
            "--kv-compression-budget",
            metavar="N",
            type=_argument(parse_budget),
            default=argparse.SUPPRESS,
            help="Tokens each layer keeps on average, window included, or that number as a share "
            f"of the prompt in (0, 1). Default: {DEFAULT_BUDGET}.",
        )
        group.add_argument(
            "--kv-compression-config",
            metavar="JSON",
            type=_argument(_parse_object),
            default=argparse.SUPPRESS,
            help="Parameters of the method and options as a JSON object, e.g. '{\"gamma\": 200}'; "
            "allow says what requests may set for themselves.",
        )
        wrap_once(parser, "parse_known_args", _move_flags_of(parser))
        return parser

    return add_cli_args


def _move_flags_of(parser: Any) -> Any:
    """Move flags as soon as they are parsed: some servers get what was parsed and nothing else."""

    def make_parsing(original: Any) -> Any:
        def parse_known_args(*args: Any, **kwargs: Any) -> Any:
            namespace, rest = original(*args, **kwargs)
            try:
                move_flags(namespace)
            except ValueError as error:
                parser.error(str(error))
            return namespace, rest

        return parse_known_args

    return make_parsing


def _read_flags(original: Any) -> Any:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        move_flags(args)
        return mark_from_words(original(cls, args))

    return from_cli_args


def move_flags(args: argparse.Namespace) -> None:
    """Turn parsed flags into an entry of additional_config. Mutates args.

    vLLM hands arguments, and not what has been made of them, to each server that it starts in a
    process of its own; there nobody may know our flags when they are read.

    Args:
        args: Parsed arguments; without our flags they stay as they are.

    Raises:
        ValueError: As :func:`merge_settings` does.

    """
    method, budget, params = (vars(args).pop(name, None) for name in _FLAGS)
    if method is not None or budget is not None or params is not None:
        args.additional_config = merge_settings(
            getattr(args, "additional_config", None), method, budget, params
        )


def _switch_on_when_asked(original: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        extra = self.additional_config
        with ends_command(self):
            check_names(extra if isinstance(extra, dict) else {})
        asked = isinstance(extra, dict) and extra.get(CONFIG_KEY) is not None
        if not asked:
            return original(self, *args, **kwargs)
        # Imported here: a vLLM without some hook must still serve those who did not ask.
        from vllm_kvcompress.engine.checks import check_version

        with ends_command(self):
            check_version()
            KVCompressionConfig.parse(extra[CONFIG_KEY])
        vllm_config = original(self, *args, **kwargs)

        with ends_command(self):
            switch_on(vllm_config)
        return vllm_config

    return create_engine_config


def _argument(parse: Any) -> Any:
    """Let argparse show the sentence of a ValueError in place of the parsing function's name."""

    @functools.wraps(parse)
    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"kv-compression-config must be a JSON object, got {text!r}")
    return value

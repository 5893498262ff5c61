"""What sub-commands of ``kvcompress`` share: reading arguments, and errors that users can mend.

A sub-command is a package with a module ``command`` that has ``add_parser(subparsers)`` and
``run(args)``. It is imported whenever the command line is parsed, so what is slow to import (torch,
transformers, vLLM) is imported inside ``run``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kvcompress.planning.config import KVCompressionConfig

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""Names that vLLM has for the model's type."""

STOPPED = 130
"""Exit status after an interrupt."""


class CommandError(Exception):
    """What a user can put right; its text is one sentence and all that the user is shown."""


def add_compression(parser: argparse.ArgumentParser) -> None:
    """Add --method, --budget and --config, which :func:`compression` reads."""
    group = parser.add_argument_group("compression")
    group.add_argument("--method", default="cake", help="(default: %(default)s)")
    group.add_argument(
        "--budget",
        default="1024",
        metavar="N",
        help="tokens per layer, or a share of the prompt (default: %(default)s)",
    )
    group.add_argument(
        "--config",
        type=json_object,
        metavar="JSON",
        help="as --kv-compression-config of the server",
    )


def add_engine_arguments(group: Any) -> None:
    """Add --engine-args."""
    group.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="further keyword arguments of vLLM's LLM",
    )


def compression(args: argparse.Namespace, block_size: int | None = None) -> KVCompressionConfig:
    """Return the settings that a server would have with these flags.

    Args:
        args: Has method, budget and config.
        block_size: Tokens of a block, which limit the budget; None: not known.

    Raises:
        CommandError: A setting that the server would refuse.

    """
    from vllm_kvcompress.engine.plugin import merge_settings
    from vllm_kvcompress.planning.config import CONFIG_KEY, KVCompressionConfig, parse_budget

    try:
        settings = merge_settings(None, args.method, parse_budget(args.budget), args.config)
        config = KVCompressionConfig.parse(settings[CONFIG_KEY])
        if block_size is not None:
            config.check_block_size(block_size)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return config


def check_prefix(prefix: Path, suffixes: Iterable[str] = ()) -> None:
    """Refuse an --output that cannot be the beginning of files' names.

    Args:
        prefix: The value of --output.
        suffixes: What follows it in the names of the files that will be written.

    Raises:
        CommandError: There is no such folder, or a file in it cannot be written.

    """
    if not prefix.name or not prefix.parent.is_dir():
        raise CommandError(
            f"--output must be a name in a folder that exists, such as out/cake, got {prefix}"
        )
    check_folder(prefix.parent, [prefix.name + suffix for suffix in suffixes])


def check_folder(folder: Path, names: Iterable[str] = ()) -> None:
    """Make a folder for --output, and refuse one in which files cannot be written.

    Args:
        folder: The folder; made if it is not there.
        names: Files that will be written there.

    Raises:
        CommandError: One sentence with the path and the reason.

    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in names):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise CommandError(f"--output: cannot write {path}: {error.strerror}") from error


def split(text: str) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, name: str, least: int = 0) -> list[int]:
    """Whole numbers between commas; CommandError if something else is there, or nothing."""
    try:
        values: Sequence[int] = [int(part) for part in split(text)]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise CommandError(f"--{name} must be whole numbers from {least} with commas, got {text!r}")
    return list(values)


def count(text: str, least: int = 1) -> int:
    """For argparse: a whole number of at least ``least``."""
    # Beyond so many digits nothing is counted here, and int() refuses to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 18) or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, got {text[:40]!r}"
        )
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """For argparse: a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a number may have too many digits
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value

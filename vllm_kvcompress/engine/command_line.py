"""Wrong settings on a command line end it as argparse does: one sentence and status 2.

The parser itself says what the words alone tell (plugin.py). What the engine's configuration tells
is known where a command makes it, which is in the process that was started, before it starts any
other. A program that makes its own arguments gets the ValueError.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_kvcompress.planning.setting_names import is_ours

_USAGE_ERROR = 2


class FromWords(dict[str, Any]):
    """An additional_config that comes from a command line, and otherwise the dict that it is.

    The arguments themselves bear no mark: ``vllm bench`` makes others of all that is in them.
    """


def mark_from_words(arguments: Any) -> Any:
    """Note that engine arguments come from a command line, and return them.

    Mutates them, but not those in whose additional_config nothing is meant for this package.
    """
    extra = arguments.additional_config
    if isinstance(extra, dict) and any(map(is_ours, extra)):
        arguments.additional_config = FromWords(extra)
    return arguments


@contextmanager
def ends_command(arguments: Any) -> Iterator[None]:
    """Turn a ValueError into the end of the command, if the arguments come from its words.

    Args:
        arguments: Engine arguments.

    Raises:
        SystemExit: With status 2, after one line on stderr.
        ValueError: As it was, if a program has made the arguments.

    """
    try:
        yield
    except ValueError as error:
        if not isinstance(arguments.additional_config, FromWords):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(_USAGE_ERROR) from None

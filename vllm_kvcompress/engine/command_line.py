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

_MARK = "_kv_compression_from_words"
_USAGE_ERROR = 2


def mark_from_words(arguments: Any) -> Any:
    """Note that engine arguments come from a command line, and return them. Mutates them."""
    setattr(arguments, _MARK, True)
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
        if not getattr(arguments, _MARK, False):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(_USAGE_ERROR) from None

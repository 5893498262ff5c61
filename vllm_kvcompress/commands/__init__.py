"""Sub-commands of ``kvcompress``: a module each, with ``add_parser(subparsers)`` and ``run(args)``.

A module is imported whenever the command line is parsed, so what is slow to import (torch,
transformers, vLLM) is imported inside ``run``.
"""


class CommandError(Exception):
    """What a user can put right; its text is one sentence and all that the user is shown."""

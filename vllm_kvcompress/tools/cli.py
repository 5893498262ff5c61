"""The command ``kvcompress``: finds the sub-command and turns users' errors into one sentence."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vllm_kvcompress import __version__
from vllm_kvcompress.tools.arguments import STOPPED, CommandError

COMMANDS = {
    "bench": "bench",
    "doctor": "doctor",
    "eval": "evaluation",
    "inspect": "inspection",
    "plan": "plan",
}
"""Name of a sub-command -> its package beside this module, in the order of --help."""

USAGE_ERROR = 2


class SentenceParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence on stderr and exit with status 2."""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every sub-command; each sets ``run`` to its function."""
    parser = SentenceParser(
        prog="kvcompress", description="KV-cache compression for vLLM: tools beside the server."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, package in COMMANDS.items():
        module = import_module(f"vllm_kvcompress.tools.{package}.command")
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Returns:
        The exit status: that of the sub-command, 2 after a user's error, 130 after an interrupt.

    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print(f"kvcompress {args.command}: stopped", file=sys.stderr)
        return STOPPED
    except CommandError as error:
        print(f"kvcompress {args.command}: {error}", file=sys.stderr)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())

"""``kvcompress doctor``: whether compression works in this environment."""

from __future__ import annotations

import argparse
from typing import Any

MARKS = {True: "ok  ", False: "FAIL", None: "note"}


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    subparsers.add_parser(
        "doctor",
        help="whether compression would work in this environment, and what it would use",
        description="Says what this environment would do: versions, whether vLLM loads the "
        "plugin, platform, device, attention, kernels, and variables that matter. Exit status 1 "
        "if compression would not work. Run it with the environment of your server.",
    )


def run(args: argparse.Namespace) -> int:
    """Look, and print a line for each thing looked at.

    Returns:
        0 if compression works here, else 1.

    """
    from vllm_kvcompress.tools.doctor.environment import findings

    works = True
    for finding in findings():
        works = works and finding.works is not False
        print(f"{MARKS[finding.works]}  {finding.about:<10} {finding.text}")
    print(
        "Compression works here."
        if works
        else "Compression would not work here: see the lines with FAIL."
    )
    return 0 if works else 1

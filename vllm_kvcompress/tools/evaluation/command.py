"""``kvcompress eval``: what methods and budgets cost in quality, against the full cache."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.arguments import DTYPES, CommandError, count, json_object, split

if TYPE_CHECKING:
    from vllm_kvcompress.tools.evaluation.setting import Setting

DEFAULT_METHODS = "full,cake,dynamickv,snapkv,pyramidkv,streamingllm,uniform,random"
DEFAULT_BUDGETS = "0.069,0.125,0.25,0.5"
PROTOCOLS = ("query-aware", "query-agnostic", "both")
BACKENDS = ("vllm", "plain", "kvpress")
NEEDED = ("matplotlib", "pandas", "scipy")


def add_parser(subparsers: Any) -> None:
    """Add the sub-command's arguments.

    Args:
        subparsers: Object that ``ArgumentParser.add_subparsers`` returned.

    """
    parser = subparsers.add_parser(
        "eval",
        help="what methods and budgets cost in quality",
        description="Answers tasks with the full cache and under methods x budgets, in one engine, "
        "and writes DIR/results.jsonl, DIR/results.md and plots. A run that was stopped goes on "
        "where it was when the same command is given again.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or hub identifier")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the results")
    parser.add_argument(
        "--dry-run", action="store_true", help="make the prompts, say what would be run, and stop"
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--tasks",
        default="ruler",
        help="tasks or suites, with commas: ruler, ruler/vt, needle, longbench/qasper, perplexity; "
        "chat/ before one for the model's chat template around it, nll/ for the likelihood of its "
        "right answers (default: %(default)s)",
    )
    asked.add_argument("--lengths", default="4096", help="tokens (default: %(default)s)")
    asked.add_argument("--prompts", type=count, default=50, help="of a task, length and seed")
    asked.add_argument("--seeds", default="0", help="each makes other prompts")
    asked.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="whether the question is part of what is compressed (default: %(default)s)",
    )
    asked.add_argument(
        "--data", type=Path, default=Path("models"), help="folder with ruler/ and longbench/"
    )
    asked.add_argument(
        "--longbench-hub",
        metavar="NAME",
        help="dataset for datasets.load_dataset instead of the files in longbench/",
    )
    compared = parser.add_argument_group("what is compared")
    compared.add_argument("--methods", default=DEFAULT_METHODS, help="(default: %(default)s)")
    compared.add_argument(
        "--budgets",
        default=DEFAULT_BUDGETS,
        help="tokens per layer or shares of what is compressed (default: %(default)s)",
    )
    compared.add_argument(
        "--variants",
        type=json_object,
        default={},
        metavar="JSON",
        help='further methods with parameters: {"cake, even": {"method": "cake", "gamma": 0}}',
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="vllm: vLLM with this plugin; plain: vLLM without it; kvpress: Hugging Face "
        "transformers with kvpress, in its own environment",
    )
    engine.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    engine.add_argument("--block-size", type=count, default=32)
    engine.add_argument("--cache-mib", type=count, help="KV cache (default: vLLM's choice)")
    engine.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="of vLLM's LLM"
    )


def run(args: argparse.Namespace) -> int:
    """Have the missing answers made, and write tables and plots.

    Args:
        args: Parsed arguments.

    Returns:
        0, or 130 after an interrupt.

    Raises:
        CommandError: The user can correct the arguments.

    """
    from vllm_kvcompress.tools.evaluation.task import EvaluationError

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing and not args.dry_run:
        raise CommandError(
            f"tables and plots need {', '.join(missing)}: pip install 'vllm_kvcompress[eval]'"
        )
    try:
        from vllm_kvcompress.tools.evaluation.run import evaluate

        return evaluate(args, settings_of(args), sys.argv[1:])
    except EvaluationError as error:
        raise CommandError(str(error)) from error


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Methods x budgets, the full cache first and once.

    Raises:
        CommandError: A budget is not a number, or a variant has no method.

    """
    from vllm_kvcompress.planning.config import parse_budget
    from vllm_kvcompress.tools.evaluation.setting import FULL, Setting, full

    try:
        budgets = [parse_budget(text) for text in split(args.budgets)]
    except ValueError as error:
        raise CommandError(f"--budgets: {error}") from error
    methods = split(args.methods)
    named: list[tuple[str, str, dict[str, Any]]] = [(m, m, {}) for m in methods if m != FULL]
    for label, entry in args.variants.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise CommandError(f'--variants: {label!r} must be an object with a "method"')
        params = {name: value for name, value in entry.items() if name != "method"}
        named.append((label, entry["method"], params))
    labels = [label for label, _, _ in named]
    for label in labels:
        if labels.count(label) > 1 or label == FULL:
            raise CommandError(f"--methods and --variants: {label!r} is there twice")
    settings = [full()] if FULL in methods else []
    settings += [
        Setting(label, m, budget, params) for label, m, params in named for budget in budgets
    ]
    if not settings:
        raise CommandError("--methods: name at least one")
    return settings

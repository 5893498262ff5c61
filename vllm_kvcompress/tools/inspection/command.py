"""``kvcompress inspect``: run a prompt through a model and draw which tokens were kept."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.arguments import (
    DTYPES,
    CommandError,
    add_engine_arguments,
    check_prefix,
    count,
    json_object,
)

if TYPE_CHECKING:
    from vllm_kvcompress.planning.config import KVCompressionConfig
    from vllm_kvcompress.tools.inspection.kept_tokens import Inspection
    from vllm_kvcompress.tools.inspection.run import InspectionJob

DEFAULT_METHOD = "cake"

DRAWING = ("jinja2", "matplotlib", "plotly")


def add_parser(subparsers: Any) -> None:
    """Add the sub-command's arguments."""
    parser = subparsers.add_parser(
        "inspect",
        help="a picture of the tokens that a method keeps of a prompt",
        description="Runs a prompt through a model, without a server, and draws which tokens every "
        "layer keeps: PREFIX.png for documents, PREFIX.html to explore.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder")
    parser.add_argument("--input", required=True, metavar="FILE", help="text, UTF-8; - for stdin")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="of the files written"
    )
    parser.add_argument("--raw", action="store_true", help="write the numbers too, PREFIX.npz")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--question", default="", metavar="TEXT", help="asked after the text")
    prompt.add_argument("--chat", action="store_true", help="use the model's chat template")
    compression = parser.add_argument_group("compression")
    methods = compression.add_mutually_exclusive_group()
    methods.add_argument("--method", metavar="NAME", help=f"(default: {DEFAULT_METHOD})")
    methods.add_argument("--compare", metavar="NAMES", help="methods, with commas between them")
    compression.add_argument(
        "--budget",
        default="0.25",
        metavar="N",
        help="tokens per layer, or a share of the prompt (default: %(default)s)",
    )
    compression.add_argument(
        "--config",
        type=json_object,
        default={},
        metavar="JSON",
        help="parameters of the method; with --compare an object of them for each method's name",
    )
    engine = parser.add_argument_group("engine")
    # Small enough for the budget of a short prompt, and what attention on a CPU can do.
    engine.add_argument("--block-size", type=count, default=32, help="(default: %(default)s)")
    engine.add_argument("--max-model-len", type=count, help="(default: what the prompt needs)")
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model")
    add_engine_arguments(engine)


def run(args: argparse.Namespace) -> int:
    """Run the prompt, and write the files.

    Returns:
        0.

    Raises:
        CommandError: The user can correct the arguments.

    """
    missing = [name for name in DRAWING if find_spec(name) is None]
    if missing:
        raise CommandError(
            f"drawing needs {', '.join(missing)}: pip install 'vllm_kvcompress[inspect]'"
        )
    check_prefix(args.output, (".png", ".html", ".npz") if args.raw else (".png", ".html"))
    job = make_job(args)

    from vllm_kvcompress.tools.inspection.run import inspect

    write(inspect(job), args.output, raw=args.raw)
    return 0


def make_job(args: argparse.Namespace) -> InspectionJob:
    """Check everything that can be checked without the model.

    Raises:
        CommandError: The user can correct the arguments.

    """
    if not (args.model / "config.json").is_file():
        raise CommandError(f"--model must be a folder with a config.json, got {args.model}")
    from vllm_kvcompress.tools.inspection.run import InspectionJob

    return InspectionJob(
        model=args.model,
        text=_read(args.input),
        question=args.question,
        chat=args.chat,
        configs=_configs(args),
        block_size=args.block_size,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        engine_args=args.engine_args,
    )


def write(inspection: Inspection, prefix: Path, *, raw: bool) -> None:
    """Write the files and name them on stdout.

    Raises:
        CommandError: One of them cannot be written.

    """
    from vllm_kvcompress.tools.inspection.arrays_file import save_arrays
    from vllm_kvcompress.tools.inspection.html_page import save_page
    from vllm_kvcompress.tools.inspection.png_picture import save_picture

    writers = {".png": save_picture, ".html": save_page, **({".npz": save_arrays} if raw else {})}
    for suffix, save in writers.items():
        path = prefix.with_name(prefix.name + suffix)
        try:
            save(inspection, path)
        except OSError as error:
            raise CommandError(f"cannot write {path}: {error.strerror}") from error
        print(path)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise CommandError(f"--input: cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(
            f"--input must be UTF-8, and {name} is not at byte {error.start}"
        ) from error
    if not text.strip():
        raise CommandError(f"--input: {name} has no text")
    return text


def _configs(args: argparse.Namespace) -> tuple[KVCompressionConfig, ...]:
    from vllm_kvcompress.planning.config import KVCompressionConfig, parse_budget

    names = [name.strip() for name in (args.compare or args.method or DEFAULT_METHOD).split(",")]
    if len(set(names)) < len(names):
        raise CommandError(f"--compare must name each method once, got {args.compare}")
    params = args.config if args.compare else {names[0]: args.config}
    for name, values in params.items():
        if name not in names or not isinstance(values, dict):
            raise CommandError(
                "--config must, with --compare, have an object of parameters under names of "
                f"its methods ({', '.join(names)}), got {json.dumps({name: values})}"
            )
    try:
        budget = parse_budget(args.budget)
        found = tuple(
            KVCompressionConfig.parse({**params.get(name, {}), "method": name, "budget": budget})
            for name in names
        )
        for config in found:
            if config.off or config.build_method().scorer.keeps_all:
                raise CommandError(f"{config.method} keeps every token, there is nothing to draw")
            config.check_block_size(args.block_size)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return found

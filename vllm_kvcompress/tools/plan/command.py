"""``kvcompress plan``: what fits into a given memory, without loading weights."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.arguments import (
    DTYPES,
    CommandError,
    add_compression,
    compression,
    count,
)
from vllm_kvcompress.tools.byte_sizes import format_bytes, parse_bytes
from vllm_kvcompress.tools.kv_space import VARIABLE, kv_space

if TYPE_CHECKING:
    from vllm_kvcompress.planning.request_settings import SettingsResolver
    from vllm_kvcompress.tools.plan.model import ServedModel
    from vllm_kvcompress.tools.plan.report import PlanReport
    from vllm_kvcompress.tools.plan.server import ServerSettings

UNKNOWN_LENGTH = 2048
"""What vLLM takes for the longest context where a configuration states none."""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command's arguments."""
    parser = subparsers.add_parser(
        "plan",
        help="blocks, concurrent requests and flags for a model and a budget",
        description="Says, without loading weights, how many blocks and concurrent requests a "
        "model has in some memory, plain and compressed, and which flags to start vLLM with.",
    )
    parser.add_argument("--model", required=True, help="folder, config.json or hub id")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--kv-cache-memory", type=_size, metavar="SIZE", help="of the KV cache, e.g. 12GiB"
    )
    memory.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="of the whole GPU, e.g. 80GiB: the weights are subtracted",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        metavar="SHARE",
        help="of --gpu-memory that vLLM may use (default: vLLM's, 0.92)",
    )
    request = parser.add_argument_group("requests")
    request.add_argument(
        "--context",
        type=count,
        metavar="TOKENS",
        help="prompt and answer of a request, and the server's --max-model-len "
        "(default: the model's longest)",
    )
    request.add_argument(
        "--output",
        type=count,
        metavar="TOKENS",
        default=256,
        help="answer tokens among them (default: %(default)s)",
    )
    add_compression(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="(default: %(default)s)"
    )
    server.add_argument(
        "--block-size", type=count, metavar="TOKENS", help="(default: vLLM's, GPU 16, CPU 128)"
    )
    server.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model")
    server.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    server.add_argument(
        "--max-num-batched-tokens", type=count, metavar="TOKENS", help="(default: vLLM's)"
    )
    server.add_argument("--max-num-seqs", type=count, metavar="N", help="(default: vLLM's)")
    server.add_argument("--tensor-parallel-size", type=count, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="write a JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Plan, and write the result to stdout.

    Returns:
        0.

    Raises:
        CommandError: What the user can put right.

    """
    from vllm_kvcompress.tools.plan.report import as_json, show

    # What vLLM and transformers have to say of a configuration is not part of a plan; errors are
    # raised.
    logging.disable()
    try:
        report = make_report(args)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        print(as_json(report))
    else:
        show(report, sys.stdout)
    return 0


def make_report(args: argparse.Namespace) -> PlanReport:
    """Work out a plan.

    Raises:
        CommandError: What the user can put right.

    """
    from vllm_kvcompress.engine.checks import check_kernels
    from vllm_kvcompress.planning.request_settings import SettingsResolver
    from vllm_kvcompress.tools.plan.figures import (
        Pool,
        SlidingWindows,
        compressed_figures,
        plain_figures,
    )
    from vllm_kvcompress.tools.plan.model import read_model
    from vllm_kvcompress.tools.plan.notes import gain_notes, window_notes
    from vllm_kvcompress.tools.plan.report import PlanReport

    _check_combinations(args)
    settings = compression(args)
    model, loaded = read_model(args.model, args.dtype)
    work = _workload(args, model)
    server = _server(args, work.context)
    try:
        check_kernels(server.device, server.block_size, model.head_size)
        resolver = SettingsResolver(settings, server.block_size, server.limits(model.groups))
    except ValueError as error:
        raise CommandError(str(error)) from None
    planner = resolver.default_planner
    assumed: list[str] = []
    memory = args.kv_cache_memory
    beside = _beside_bytes(resolver, server, model)
    if args.gpu_memory is not None:
        memory = _left_of_gpu(args, model, loaded, assumed)
    size = server.block_size
    block = model.block_bytes(size, args.kv_cache_dtype)
    windows = SlidingWindows(model.groups, size, server.in_flight, server.lag)
    pool = Pool(memory, block, size)
    # If the user chose the size of the pool, the worker takes nothing off it.
    less = beside if args.gpu_memory is not None else 0
    smaller = Pool(max(memory - less, 0), block, size)
    plain = plain_figures(pool, work, windows)
    compressed = compressed_figures(smaller, work, planner, windows)
    assumed += _assumptions(args, model, loaded, server, beside)
    return PlanReport(
        model=model,
        server=server,
        work=work,
        config=settings,
        cache_dtype=args.kv_cache_dtype,
        token_bytes=model.page_bytes(size, args.kv_cache_dtype) * model.layers // size,
        plain=plain,
        compressed=compressed,
        beside=beside,
        assumed=assumed,
        notes=[
            *gain_notes(plain, compressed, work, planner, server),
            *window_notes(model, work, windows),
        ],
        shared_flags=_shared_flags(args, server),
    )


def _check_combinations(args: argparse.Namespace) -> None:
    from vllm_kvcompress.engine import checks

    if args.tensor_parallel_size != 1:
        raise CommandError(str(checks.unsupported(*checks.PARALLEL)))
    if args.gpu_memory is not None and args.device == "cpu":
        raise CommandError("--gpu-memory needs --device gpu; on a CPU give --kv-cache-memory")
    if args.gpu_memory_utilization is not None and args.gpu_memory is None:
        raise CommandError(
            "--gpu-memory-utilization needs --gpu-memory; vLLM ignores it beside a size of the "
            "KV cache"
        )
    if args.device == "cpu" and args.kv_cache_dtype == "fp8":
        raise CommandError(str(checks.unsupported(*checks.QUANTIZED_ON_CPU)))
    if args.max_num_seqs and args.max_num_seqs > (args.max_num_batched_tokens or args.max_num_seqs):
        raise CommandError(
            f"--max-num-seqs {args.max_num_seqs} is more than --max-num-batched-tokens "
            f"{args.max_num_batched_tokens}, with which vLLM does not start"
        )


def _workload(args: argparse.Namespace, model: ServedModel) -> Any:
    from vllm_kvcompress.tools.plan.figures import Workload

    longest = model.max_model_len or args.context or UNKNOWN_LENGTH
    context = args.context or model.default_model_len or UNKNOWN_LENGTH
    if context > longest:
        raise CommandError(
            f"--context {context} is beyond the model's {longest} tokens, with which vLLM would "
            "not start"
        )
    if args.output >= context:
        raise CommandError(
            f"--output {args.output} leaves no prompt: it must be below --context {context}"
        )
    return Workload(context, args.output, longest)


def _server(args: argparse.Namespace, context: int) -> ServerSettings:
    from vllm_kvcompress.tools.plan.server import BLOCK_SIZES, ServerSettings, batch_defaults

    tokens, requests = batch_defaults(args.device, args.gpu_memory)
    tokens = args.max_num_batched_tokens or min(tokens, requests * context)
    return ServerSettings(
        device=args.device,
        block_size=args.block_size or BLOCK_SIZES[args.device],
        max_num_batched_tokens=tokens,
        max_num_seqs=args.max_num_seqs or min(requests, tokens),
        max_model_len=context,
    )


def _beside_bytes(resolver: SettingsResolver, server: ServerSettings, model: ServedModel) -> int:
    """Bytes that compression takes beside the pool, as the GPU worker counts them."""
    from vllm_kvcompress.planning.workspace_memory import workspace_bytes

    if server.device != "gpu":
        return 0
    held, transient = workspace_bytes(
        resolver,
        model.shape,
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens,
        max_model_len=server.max_model_len,
    )
    return held + transient


def _left_of_gpu(
    args: argparse.Namespace, model: ServedModel, loaded: Any, assumed: list[str]
) -> int:
    """Return the bytes for the KV cache; appends to ``assumed`` how they are calculated."""
    from vllm_kvcompress.tools.plan.weights import weight_bytes

    weights, source = weight_bytes(model, loaded)
    share = _utilization(args)
    usable = int(args.gpu_memory * share)
    if usable <= weights:
        raise CommandError(
            f"the weights of {format_bytes(weights)} ({source}) leave nothing of "
            f"{format_bytes(args.gpu_memory)} x {share}"
        )
    assumed.append(
        f"The pool is {format_bytes(args.gpu_memory)} x {share} less weights of "
        f"{format_bytes(weights)} ({source})."
    )
    assumed.append(
        "Not counted: activations, CUDA graphs and what else lies on the GPU. vLLM measures them "
        "at start, so the real pool is smaller than this one."
    )
    return usable - weights


def _assumptions(
    args: argparse.Namespace, model: ServedModel, loaded: Any, server: ServerSettings, beside: int
) -> list[str]:
    said = []
    if not (args.max_num_batched_tokens and args.max_num_seqs):
        where = "on a CPU"
        if server.device == "gpu":
            memory = args.gpu_memory
            where = f"on a GPU of {format_bytes(memory)}" if memory else "on a GPU below 70 GiB"
        said.append(
            f"Steps of {server.max_num_batched_tokens:,} tokens and {server.max_num_seqs:,} "
            f"requests, where not given: what vllm serve takes {where}."
        )
    if server.device == "cpu" and kv_space():
        said.append(
            f"{VARIABLE}={kv_space()} is set here; vLLM would take it for the KV cache's GiB in "
            "place of the flag, so start the server without it."
        )
    if beside:
        how = "taken off its pool" if args.gpu_memory else "not part of the size given"
        said.append(
            f"Compression holds {format_bytes(beside)} beside the pool for page tables and for "
            f"scoring a prompt of {server.max_model_len:,} tokens, {how}."
        )
    quantization = getattr(loaded, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    named = quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo")
    if named and args.kv_cache_dtype == "auto":
        said.append(
            "The checkpoint asks for a quantized KV cache, which vLLM may follow: compare with "
            "--kv-cache-dtype fp8."
        )
    if model.max_model_len is None:
        said.append("The configuration states no longest context.")
    return said


def _shared_flags(args: argparse.Namespace, server: ServerSettings) -> list[tuple[str, str]]:
    flags = [("--max-model-len", str(server.max_model_len))]
    if args.gpu_memory is None:
        flags.append(("--kv-cache-memory-bytes", str(args.kv_cache_memory)))
    else:
        flags.append(("--gpu-memory-utilization", str(_utilization(args))))
    flags.append(("--block-size", str(server.block_size)))
    flags.append(("--max-num-batched-tokens", str(server.max_num_batched_tokens)))
    if args.max_num_seqs is not None:
        flags.append(("--max-num-seqs", str(args.max_num_seqs)))
    for flag, value in (("--dtype", args.dtype), ("--kv-cache-dtype", args.kv_cache_dtype)):
        if value != "auto":
            flags.append((flag, value))
    return flags


def _utilization(args: argparse.Namespace) -> float:
    from vllm_kvcompress.tools.plan.server import GPU_MEMORY_UTILIZATION

    return float(args.gpu_memory_utilization or GPU_MEMORY_UTILIZATION)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value

"""``kvcompress plan``: what a model, memory and a budget come to, without loading weights."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.arguments import CommandError, count, json_object
from vllm_kvcompress.tools.byte_sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from vllm_kvcompress.planning.config import KVCompressionConfig
    from vllm_kvcompress.planning.request_settings import SettingsResolver
    from vllm_kvcompress.tools.plan.engine import EngineFacts
    from vllm_kvcompress.tools.plan.model import ModelFacts
    from vllm_kvcompress.tools.plan.report import Report

DEFAULT_OUTPUT = 256
DTYPE_NAMES = ("auto", "half", "float16", "bfloat16", "float", "float32")
UNKNOWN_LENGTH = 2048
"""What vLLM takes for the longest context where a configuration states none."""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command's arguments.

    Args:
        subparsers: What ``ArgumentParser.add_subparsers`` returned.

    """
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
        default=DEFAULT_OUTPUT,
        help="answer tokens among them (default: %(default)s)",
    )
    compression = parser.add_argument_group("compression")
    compression.add_argument("--method", default="cake", help="(default: %(default)s)")
    compression.add_argument(
        "--budget", metavar="N", help="tokens per layer, or a share of the prompt (default: 1024)"
    )
    compression.add_argument(
        "--config",
        type=json_object,
        metavar="JSON",
        help="as --kv-compression-config of the server",
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="(default: %(default)s)"
    )
    server.add_argument(
        "--block-size", type=count, metavar="TOKENS", help="(default: vLLM's, GPU 16, CPU 128)"
    )
    server.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="of the model")
    server.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    server.add_argument(
        "--max-num-batched-tokens", type=count, metavar="TOKENS", help="(default: vLLM's)"
    )
    server.add_argument("--max-num-seqs", type=count, metavar="N", help="(default: vLLM's)")
    server.add_argument("--tensor-parallel-size", type=count, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="write a JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Plan, and write the result to stdout.

    Args:
        args: As parsed.

    Returns:
        0.

    Raises:
        CommandError: What the user can put right.

    """
    from vllm_kvcompress.tools.plan.report import as_json, show

    report = make_report(args)
    if args.json:
        print(as_json(report))
    else:
        show(report, sys.stdout)
    return 0


def make_report(args: argparse.Namespace) -> Report:
    """Work out a plan.

    Args:
        args: As parsed.

    Raises:
        CommandError: What the user can put right.

    """
    from vllm_kvcompress.tools.plan.engine import beside_bytes
    from vllm_kvcompress.tools.plan.figures import (
        Pool,
        Windows,
        block_bytes,
        compressed_figures,
        plain_figures,
    )
    from vllm_kvcompress.tools.plan.model import load_config, model_facts
    from vllm_kvcompress.tools.plan.notes import gain_notes, window_notes
    from vllm_kvcompress.tools.plan.report import Report

    _check_combinations(args)
    settings = _settings(args)
    loaded = load_config(args.model)
    model = model_facts(args.model, loaded, args.dtype)
    work = _workload(args, model)
    engine = _engine(args, work.context)
    resolver = _resolver(settings, engine, model)
    planner = resolver.default_planner
    assumed: list[str] = []
    memory = args.kv_cache_memory
    beside = beside_bytes(resolver, model, engine)
    if args.gpu_memory is not None:
        memory = _left_of_gpu(args, model, loaded, assumed)
    itemsize = 1 if args.kv_cache_dtype == "fp8" else model.dtype.itemsize
    size = engine.block_size
    page = block_bytes(1, model.kv_heads, model.head_size, size, itemsize)
    block = page * model.groups.pages_of_block(model.layers)
    windows = Windows(model.groups, size, engine.in_flight, engine.lag)
    pool = Pool(memory, block, size)
    # A pool sized by hand keeps its size; else the worker sets its own needs aside.
    less = beside if args.gpu_memory is not None else 0
    smaller = Pool(max(memory - less, 0), block, size)
    plain = plain_figures(pool, work, windows)
    compressed = compressed_figures(smaller, work, planner, windows)
    assumed += _assumptions(args, model, loaded, engine, beside)
    return Report(
        model=model,
        engine=engine,
        work=work,
        config=settings,
        cache_dtype=args.kv_cache_dtype,
        token_bytes=page * model.layers // size,
        plain=plain,
        compressed=compressed,
        beside=beside,
        assumed=assumed,
        notes=[
            *gain_notes(plain, compressed, work, planner, engine),
            *window_notes(model, work, windows),
        ],
        shared_flags=_shared_flags(args, engine),
    )


def _check_combinations(args: argparse.Namespace) -> None:
    if args.tensor_parallel_size != 1:
        raise CommandError(
            "tensor or pipeline parallelism is not yet supported with --kv-compression; set "
            f"--tensor-parallel-size to 1, got {args.tensor_parallel_size}"
        )
    if args.gpu_memory is not None and args.device == "cpu":
        raise CommandError("--gpu-memory needs --device gpu; on a CPU give --kv-cache-memory")
    if args.gpu_memory_utilization is not None and args.gpu_memory is None:
        raise CommandError(
            "--gpu-memory-utilization needs --gpu-memory; vLLM ignores it beside a size of the "
            "KV cache"
        )
    if args.device == "cpu" and args.kv_cache_dtype == "fp8":
        raise CommandError(
            "a quantized KV cache on the CPU is not supported with --kv-compression; drop "
            "--kv-cache-dtype"
        )
    if args.device == "gpu" and args.block_size is not None and args.block_size % 16:
        raise CommandError(f"--block-size must be a multiple of 16 on a GPU, got {args.block_size}")


def _settings(args: argparse.Namespace) -> KVCompressionConfig:
    from vllm_kvcompress.engine.plugin import merge_settings
    from vllm_kvcompress.planning.config import CONFIG_KEY, KVCompressionConfig, parse_budget

    try:
        budget = None if args.budget is None else parse_budget(args.budget)
        merged = merge_settings(None, args.method, budget, args.config)
        return KVCompressionConfig.parse(merged[CONFIG_KEY])
    except ValueError as error:
        raise CommandError(str(error)) from None


def _workload(args: argparse.Namespace, model: ModelFacts) -> Any:
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


def _engine(args: argparse.Namespace, context: int) -> EngineFacts:
    from vllm_kvcompress.tools.plan.engine import BLOCK_SIZES, EngineFacts, batch_defaults

    tokens, requests = batch_defaults(args.device, args.gpu_memory)
    tokens = args.max_num_batched_tokens or min(tokens, requests * context)
    return EngineFacts(
        device=args.device,
        block_size=args.block_size or BLOCK_SIZES[args.device],
        max_num_batched_tokens=tokens,
        max_num_seqs=args.max_num_seqs or min(requests, tokens),
        max_model_len=context,
    )


def _resolver(
    settings: KVCompressionConfig, engine: EngineFacts, model: ModelFacts
) -> SettingsResolver:
    from vllm_kvcompress.planning.request_settings import SettingsResolver

    if model.groups.window_groups and settings.prefill == "cascade":
        raise CommandError(
            "kv_compression: prefill cascade is not supported for models with sliding-window "
            "layers, which need blocks for the whole prompt in that step; set prefill to auto"
        )
    try:
        return SettingsResolver(settings, engine.block_size, engine.limits(model.groups))
    except ValueError as error:
        raise CommandError(str(error)) from None


def _left_of_gpu(
    args: argparse.Namespace, model: ModelFacts, loaded: Any, assumed: list[str]
) -> int:
    """Bytes for the KV cache; says in ``assumed`` how they come about."""
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
    args: argparse.Namespace, model: ModelFacts, loaded: Any, engine: EngineFacts, beside: int
) -> list[str]:
    said = []
    if not (args.max_num_batched_tokens and args.max_num_seqs):
        where = "on a CPU"
        if engine.device == "gpu":
            memory = args.gpu_memory
            where = f"on a GPU of {format_bytes(memory)}" if memory else "on a GPU below 70 GiB"
        said.append(
            f"Steps of {engine.max_num_batched_tokens:,} tokens and {engine.max_num_seqs:,} "
            f"requests, where not given: what vllm serve takes {where}."
        )
    if beside:
        how = "taken off its pool" if args.gpu_memory else "not part of the size given"
        said.append(
            f"Compression holds {format_bytes(beside)} beside the pool for page tables and for "
            f"scoring a prompt of {engine.max_model_len:,} tokens, {how}."
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


def _shared_flags(args: argparse.Namespace, engine: EngineFacts) -> list[tuple[str, str]]:
    flags = [("--max-model-len", str(engine.max_model_len))]
    if args.gpu_memory is None:
        flags.append(("--kv-cache-memory-bytes", str(args.kv_cache_memory)))
    else:
        flags.append(("--gpu-memory-utilization", str(_utilization(args))))
    flags.append(("--block-size", str(engine.block_size)))
    flags.append(("--max-num-batched-tokens", str(engine.max_num_batched_tokens)))
    if args.max_num_seqs is not None:
        flags.append(("--max-num-seqs", str(args.max_num_seqs)))
    for flag, value in (("--dtype", args.dtype), ("--kv-cache-dtype", args.kv_cache_dtype)):
        if value != "auto":
            flags.append((flag, value))
    return flags


def _utilization(args: argparse.Namespace) -> float:
    from vllm_kvcompress.tools.plan.engine import GPU_MEMORY_UTILIZATION

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

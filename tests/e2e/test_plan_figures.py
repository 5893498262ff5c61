"""``kvcompress plan`` predicts what vLLM and the engine then have."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.harness import (
    HYBRID,
    MODELS,
    SMALL,
    Engines,
    small_model,
)
from vllm_kvcompress.tools.cli import build_parser
from vllm_kvcompress.tools.plan.command import make_report
from vllm_kvcompress.tools.plan.report import PlanReport
from vllm_kvcompress.tools.plan.server import (
    BLOCK_SIZES,
    GPU_MEMORY_UTILIZATION,
    batch_defaults,
)

GIB = 1 << 30


def plan(model: Path, *words: str) -> PlanReport:
    return make_report(build_parser().parse_args(["plan", "--model", str(model), *words]))


@pytest.mark.engine
def test_an_engine_has_the_blocks_and_the_concurrency_of_its_plan(engines: Engines) -> None:
    from vllm.v1.core import kv_cache_utils

    engine = engines.open()
    words = "--device cpu --dtype float32 --block-size 32 --context 2048 --budget 256"
    words += " --kv-cache-memory 256MiB --max-num-batched-tokens 2048"
    report = plan(small_model(), *words.split())
    assert report.plain.blocks == report.compressed.blocks == engine.total_blocks() + 1
    config = engine.llm.llm_engine.vllm_config
    assert config.scheduler_config.max_num_batched_tokens == report.server.max_num_batched_tokens
    assert bool(config.scheduler_config.async_scheduling) == bool(report.server.lag)
    cache = engine.scheduler.kv_cache_config
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config
    assert concurrency(config, cache) == report.compressed.concurrency
    # vLLM's own line, as a server without compression would print it.
    assert concurrency.__wrapped__(config, plain_cache(cache)) == report.plain.concurrency
    # A request of that kind holds what was planned, and no more than that.
    prompt = [7 + i % 900 for i in range(report.work.prompt)]
    _, held = engine.run_counting([prompt], report.work.output)
    assert max(held) <= report.plain.after_prefill + report.compressed.after_prefill
    assert held[-2] == report.compressed.at_end


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_vllm_makes_of_a_hybrid_what_is_planned(device: str) -> None:
    """Blocks, concurrency and the longest context, as vLLM's start-up works them out."""
    from vllm.v1.core import kv_cache_utils

    words = f"--device {device} --dtype float32 --block-size 32 --context 4096 --budget 256"
    words += " --kv-cache-memory 100MiB --max-num-batched-tokens 512"
    report = plan(MODELS / HYBRID, *words.split())
    # The largest context that fits is neither the one asked for nor the model's.
    assert 4096 < report.compressed.longest < report.plain.longest < 32768
    for compressed, figures in ((False, report.plain), (True, report.compressed)):
        config, specs = hybrid_specs(report, compressed=compressed)
        (cache,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [figures.memory])
        assert cache.num_blocks == figures.blocks
        concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config
        assert concurrency(config, cache) == figures.concurrency
        # It starts with the longest context, and with none that is longer.
        config.model_config.max_model_len = figures.longest
        kv_cache_utils.get_kv_cache_configs(config, [specs], [figures.memory])
        config.model_config.max_model_len = figures.longest + 1
        with pytest.raises(ValueError, match="max seq len"):
            kv_cache_utils.get_kv_cache_configs(config, [specs], [figures.memory])


def hybrid_specs(report: PlanReport, *, compressed: bool) -> tuple[Any, dict[str, Any]]:
    """The planned server's configuration, and what its layers ask vLLM for."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_kvcompress.engine.plugin import register
    from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

    register()
    settings = {"kv_compression": report.config.as_dict()} if compressed else {}
    config = EngineArgs(
        model=report.model.name,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        max_model_len=report.work.context,
        block_size=report.server.block_size,
        max_num_batched_tokens=report.server.max_num_batched_tokens,
        additional_config=settings,
    ).create_engine_config()
    # The CPU platform turns asynchronous scheduling off, and leaves the layout to its backend.
    config.scheduler_config.async_scheduling = bool(report.server.lag)
    config.cache_config.kv_cache_layout = "LBHNC"
    model = config.model_config
    shape: dict[str, Any] = {
        "block_size": report.server.block_size,
        "num_kv_heads": model.get_num_kv_heads(config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": torch.float32,
    }
    local = SlidingWindowSpec(**shape, sliding_window=model.get_sliding_window())
    full = (ArenaSpec if compressed else FullAttentionSpec)(**shape)
    kinds = model.hf_text_config.layer_types
    return config, {
        f"layers.{number}": local if kind == "sliding_attention" else full
        for number, kind in enumerate(kinds)
    }


def plain_cache(cache: Any) -> Any:
    """The same pool under vLLM's own spec."""
    from dataclasses import fields, replace

    from vllm.v1.kv_cache_interface import FullAttentionSpec

    (group,) = cache.kv_cache_groups
    spec = group.kv_cache_spec
    values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
    return replace(
        cache, kv_cache_groups=[replace(group, kv_cache_spec=FullAttentionSpec(**values))]
    )


def test_defaults_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CacheConfig
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    assert CacheConfig().gpu_memory_utilization == GPU_MEMORY_UTILIZATION
    assert BLOCK_SIZES["gpu"] == CacheConfig.DEFAULT_BLOCK_SIZE
    cases: list[tuple[str, int | None]] = [("cpu", None), ("gpu", None)]
    for device, memory in [*cases, *(("gpu", g * GIB) for g in (24, 69, 70, 80, 159, 160, 192))]:
        platform = SimpleNamespace(
            get_device_total_memory=lambda memory=memory: memory or 0,
            get_device_name=lambda: "some GPU",
            is_tpu=lambda: False,
            is_cpu=lambda device=device: device == "cpu",
        )
        monkeypatch.setattr(arg_utils, "current_platform", platform)
        tokens, requests = arg_utils.EngineArgs.get_batch_defaults(1)
        server = UsageContext.OPENAI_API_SERVER
        assert batch_defaults(device, memory) == (tokens[server], requests[server])


def test_vllm_takes_both_command_lines() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_kvcompress.engine.plugin import register

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--config", '{"gamma": 200, "decode_budget": 256}', "--max-num-seqs", "8"]
    words += ["--dtype", "half", "--kv-cache-dtype", "fp8", "--budget", "256"]
    for memory in (["--kv-cache-memory", "1GiB"], ["--gpu-memory", "8GiB"]):
        report = plan(MODELS / SMALL, *words, *memory)
        for name, command in report.commands().items():
            assert shlex.split(shlex.join(command)) == command
            assert command[:3] == ["vllm", "serve", str(MODELS / SMALL)]
            args = parser.parse_args(["--model", *command[2:]])
            assert args.max_model_len == 8192
            assert args.block_size == 16
            assert args.max_num_seqs == 8
            config = AsyncEngineArgs.from_cli_args(args).additional_config
            expected = {"method": "cake", "budget": 256, "gamma": 200, "decode_budget": 256}
            assert config == ({"kv_compression": expected} if name == "compressed" else {})


def test_what_lies_beside_the_pool_is_what_the_gpu_worker_sets_aside(tmp_path: Path) -> None:
    from tests.engine.test_gpu_worker import make_worker

    given = {"method": "cake", "budget": 512, "decode_budget": 512}
    worker = make_worker(tmp_path, additional_config={"kv_compression": given})
    scheduler = worker.vllm_config.scheduler_config
    words = ["--kv-cache-memory", "1GiB", "--block-size", "32", "--max-num-seqs", "64"]
    words += ["--max-num-batched-tokens", str(scheduler.max_num_batched_tokens)]
    words += ["--budget", "512", "--config", json.dumps({"decode_budget": 512})]
    assert plan(tmp_path, *words).beside == sum(worker._workspace())

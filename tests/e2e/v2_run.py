"""Runs prompts under model runner V2 without a GPU: a job a line in, its outputs as JSON out.

V2's kernels are Triton's; its interpreter runs them on the CPU. That has to be arranged before
vLLM is imported, so the tests start this file as a process of its own (``interpreted.py``).

    echo '{"prompts": [[...]], "max_tokens": 20, "method": "scatter"}' | python -m tests.e2e.v2_run

``"backend"`` takes a GPU's attention: ``"TRITON_ATTN"`` through the interpreter, ``"FLASH_ATTN"``
with stand-ins for its kernels (see ``flash_stand_in.py``). ``"graphs": [1, 2, 4]`` captures decode
steps of these sizes in FULL mode, with a stand-in for CUDA's graphs that runs the captured call
again: whatever was a number at capture stays that number, and only what lies in buffers can change,
as in a real one. ``"rounded": [q, k, v]`` computes with the numbers that an FP8 cache with these
scales of each layer would have.
"""

import functools
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.compiler_keys import launch_on_cpu, record_launches
from tests.support.inference_mode import WATCH
from tests.support.interpreted_kernels import cast_to_fp8_as_a_gpu_does, prepare_once_a_launch


class _Driver:
    """Makes vLLM believe that Triton has a CPU backend; the interpreter never asks it."""

    @staticmethod
    def is_active() -> bool:
        return True


def _offer_gpu_attention(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let the CPU platform choose a GPU's attention backend."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash

    from tests.e2e import flash_stand_in
    from vllm_kvcompress import methods  # noqa: F401 - they are to be seen below

    def backend(*_: Any, **__: Any) -> str:
        return str(AttentionBackendEnum[name].get_path())

    def always(*_: Any) -> bool:
        return True

    patch.setattr(CpuPlatform, "get_attn_backend_cls", staticmethod(backend))
    launch_on_cpu(patch)
    if name == "FLASH_ATTN":
        flash_stand_in.install(patch)
    # The launchers of the Triton backend ask for the GPU's generation.
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(triton_reshape_and_cache_flash, "_is_supported_kv_cache_dtype", always)
    # An FP8 cache comes with FP8 queries on CUDA.
    make = triton_attn.TritonAttentionImpl.__init__

    @functools.wraps(make)
    def make_for_cuda(impl: Any, *args: Any, **kwargs: Any) -> None:
        make(impl, *args, **kwargs)
        impl.supports_quant_query_input = True

    patch.setattr(triton_attn.TritonAttentionImpl, "__init__", make_for_cuda)


def _round_to_fp8(patch: pytest.MonkeyPatch, scales: list[list[float]]) -> None:
    """Hand attention the numbers that FP8 queries, keys and values would stand for.

    Args:
        patch: Undoes it.
        scales: Of queries, keys and values, a number for each layer.

    """
    import torch
    from vllm.model_executor.layers.attention import Attention

    from tests.e2e.flash_stand_in import quantized

    forward = Attention.forward

    def forward_rounded(attention: Any, *operands: Any, **kwargs: Any) -> Any:
        layer = int(attention.layer_name.split(".")[2])
        rounded = [
            quantized(operand, torch.tensor(numbers[layer])).float() * numbers[layer]
            for operand, numbers in zip(operands[:3], scales, strict=True)
        ]
        return forward(attention, *rounded, *operands[3:], **kwargs)

    patch.setattr(Attention, "forward", forward_rounded)


def _capture(patch: pytest.MonkeyPatch, runner: Any, sizes: list[int]) -> Any:
    """Give the runner FULL graphs of decode steps; return what counts replays."""
    import torch
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    replayed = {"steps": 0}

    @torch.inference_mode()  # as vLLM's
    def capture(manager: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in manager._capture_descs[CUDAGraphMode.FULL]:
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)

            def replay(forward: Any = forward) -> None:
                replayed["steps"] += 1
                forward(CUDAGraphMode.NONE)

            manager.graphs[desc] = SimpleNamespace(replay=replay)
        manager._graphs_captured = True

    platform = type(cudagraph_utils.current_platform)
    patch.setattr(platform, "_global_graph_pool", object(), raising=False)
    patch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    config = runner.compilation_config
    config.cudagraph_capture_sizes = sizes
    config.max_cudagraph_capture_size = max(sizes)
    groups = (group for several in runner.attn_groups for group in several)
    for builder in (builder for group in groups for builder in group.metadata_builders):
        if hasattr(builder, "use_full_cuda_graph"):
            # What the builder of FLASH_ATTN prepares where the configuration names full graphs.
            builder.use_full_cuda_graph = True
            builder.scheduler_metadata = torch.zeros(1 + 4 * max(sizes), dtype=torch.int32)
    runner.cudagraph_manager = manager = cudagraph_utils.ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1
    )
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    return replayed


class Launches:
    """The compiler's keys of all launches; a new one of ours may be an error, as on a GPU.

    Attributes:
        keys: Of our kernels.
        late: Of all kernels, those first seen after vLLM's monitor had been armed.

    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton import knobs

        self.keys: set[str] = set()
        self.late: list[str] = []
        self._seen: set[str] = set()
        self._warming_up = False
        # vLLM's monitor puts its hook there.
        patch.setattr(knobs.runtime, "jit_post_compile_hook", None)
        self._knobs = knobs.runtime
        record_launches(patch, self._note)

    def warm_up(self, original: Any) -> Any:
        """Wrap our warm-up: interpreting what it has launched before shows nothing new."""
        import torch

        def warm_up(*args: Any, **kwargs: Any) -> None:
            self._warming_up = True
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", torch.zeros)
                patch.setattr(torch, "empty_like", torch.zeros_like)
                patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
                original(*args, **kwargs)
            self._warming_up = False

        return warm_up

    def _note(self, key: str) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        ours = key.startswith("kvcompress_kernels.")
        if ours:
            self.keys.add(key)
        if new and self._knobs.jit_post_compile_hook is not None:
            self.late.append(key)
            if ours:
                self._knobs.jit_post_compile_hook(fn=SimpleNamespace(name=key))
        return new or not self._warming_up


def run(patch: pytest.MonkeyPatch, job: dict[str, Any]) -> dict[str, Any]:
    """Run one engine; see the module's docstring for the job's fields."""
    import torch

    from tests.e2e import gpu_worker_stand_in
    from tests.e2e.harness import Engines
    from vllm_kvcompress.engine.step.session import Session

    settings = dict(job.get("settings", {}))
    if "rounded" in job:
        _round_to_fp8(patch, job["rounded"])
    if "backend" in job:
        _offer_gpu_attention(patch, job["backend"])
        settings["attention_backend"] = job["backend"]
    events: list[str] = []
    launches = Launches(patch)
    patch.setattr(Session, "warm_up", launches.warm_up(Session.warm_up))
    if job.get("gpu_worker"):
        settings |= gpu_worker_stand_in.install(patch, job, events)
    method, engines = job.get("method"), Engines()
    engine = engines.get(
        method, job.get("budget"), config=job.get("config"), model=job["model"], **settings
    )
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    replayed: dict[str, int] = {}
    if "graphs" in job and not events:
        replayed = _capture(patch, runner, job["graphs"])
    if job.get("warm_up"):
        # As bytes: what nobody has written is NaN, which equals nothing.
        cache = engine.session.flat_cache.view(torch.uint8)
        before = cache.clone()
        with torch.inference_mode():
            engine.session.warm_up(runner.max_model_len)
        assert torch.equal(cache, before)
    warm, left = sorted(launches.keys), _left_behind(engine, runner)
    kept = engine.record_kept() if method else []
    rounds, logprobs = [], []
    for _ in range(job.get("rounds", 1)):
        outputs = engine.complete(
            job["prompts"], job["max_tokens"], logprobs=0, extra_args=job.get("extra")
        )
        rounds.append([list(o.token_ids) for o in outputs])
        logprobs.append([o.cumulative_logprob for o in outputs])
    engine.check()
    impl = next(iter(runner.compilation_config.static_forward_context.values())).impl
    result = {
        "outputs": rounds,
        "logprobs": logprobs,
        "kept": kept,
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "attention": type(impl).__name__,
        "replayed": gpu_worker_stand_in.replays() if events else replayed.get("steps", 0),
        "events": events,
        "left_behind": left,
        "memory": gpu_worker_stand_in.memory_of(engine) if events else {},
        "warm": warm,
        "launched": sorted(launches.keys),
        "late": launches.late,
        "stats": engine.stats,
        "inside": sorted(WATCH.inside),
        "outside": sorted(WATCH.outside),
    }
    del engine, runner, impl
    engines.close()
    return result


def _left_behind(engine: Any, runner: Any) -> list[str]:
    """Requests that somebody in the worker knows of, before there is any."""
    known = list(runner.req_states.req_id_to_index)
    if engine.compressed:
        known += [name for name, _ in engine.session._ledger]
        known += engine.session._scheduled
    return known


def main() -> None:
    """Run one job a line, and leave no trace of it for the next one."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
    prepare_once_a_launch()
    cast_to_fp8_as_a_gpu_does()
    for line in sys.stdin:
        with pytest.MonkeyPatch.context() as patch:
            result = run(patch, json.loads(line))
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""vLLM's own GPU worker on the CPU: all of it is real but the device.

The worker that a GPU's engine starts is derived from here and not imitated: its ``init_device``
makes a CPU device, and the calls to torch's accelerator and CUDA modules that are left are
stubbed. So a start takes the way of ``vllm.v1.worker.gpu_worker.Worker``, whatever that is in the
installed version: profile runs, KV cache, JIT warm-up, graph capture, JIT monitor, frozen heap,
sync check.
"""

# First: vLLM's stand-ins for streams, events and buffers that both CPU and GPU see.
import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip

import functools
import gc
import os
import pkgutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.warmup import kernel_warmup
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.utils import gpu_sync_debug, jit_monitor
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory

from vllm_kvcompress.engine import checks
from vllm_kvcompress.engine.worker.gpu_worker import ArenaGPUWorker

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
MEMORY = 8 << 30
"""Bytes of memory that the device says are free."""


class OnCPU:
    """First base of a GPU worker whose device is the CPU."""

    def init_device(self: Any) -> None:
        """What vLLM's Worker does for a CUDA device, but for choosing that."""
        self.device = torch.device("cpu")
        os.environ["VLLM_DIST_IDENT"] = self.distributed_init_method.split(":")[-1]
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()


class PlainOnCPU(OnCPU, Worker):
    """Plain vLLM's."""


class ArenaOnCPU(OnCPU, ArenaGPUWorker):
    """Ours."""


class _Platform:
    """The CPU's platform, which says of itself that it is a CUDA device."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_cuda_alike(self) -> bool:
        return True

    is_cuda = is_cuda_alike

    def is_cpu(self) -> bool:
        return False


class _Graph:
    """A CUDA graph that runs the captured call again.

    Whatever was a number at capture stays that number, and only what lies in buffers can change,
    as in a real one.
    """

    replays = 0
    forward: Any = None

    def replay(self) -> None:
        type(self).replays += 1
        self.forward(CUDAGraphMode.NONE)


class _Capturing:
    """Stand in for the context ``torch.cuda.graph``: the call inside becomes the graph's."""

    latest: list[Any]

    def __init__(self, graph: _Graph, *_: Any, **__: Any) -> None:
        (graph.forward,) = self.latest

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def install(patch: pytest.MonkeyPatch, job: dict[str, Any], events: list[str]) -> dict[str, Any]:
    """Let engines start GPU workers; returns settings for the engine.

    Args:
        patch: Undoes it.
        job: ``graphs``, sizes to capture decode steps for; ``jit_monitor``, the monitor's mode.
        events: Gets the names of what a start does, in order.

    """
    _stub_memory(patch)
    _stub_graphs(patch)
    patch.setitem(checks.WORKERS, CPU_WORKER, f"{__name__}.{ArenaOnCPU.__name__}")
    patch.setattr(gpu_worker, "current_platform", _Platform(current_platform))
    configure = CpuPlatform.check_and_update_config.__func__

    def keep_graphs(cls: Any, config: Any) -> None:
        sizes, mode = job.get("graphs", []), config.compilation_config.mode
        configure(cls, config)
        if "method" not in job:
            config.parallel_config.worker_cls = f"{__name__}.{PlainOnCPU.__name__}"
        config.cache_config.kv_cache_memory_bytes = None  # a GPU's worker finds out
        compilation = config.compilation_config
        compilation.mode, compilation.cudagraph_capture_sizes = mode, sizes
        compilation.max_cudagraph_capture_size = max(sizes, default=0)

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_graphs))
    _watch(patch, events)
    # Both import torchvision, which there is none of on the CPU, and are for other models.
    module = "vllm.model_executor.warmup.minimax_m3_msa_warmup"
    other = SimpleNamespace(minimax_m3_msa_warmup=lambda *_: None)
    patch.setitem(sys.modules, module, other)
    patch.setattr(kernel_warmup, "qwen_vl_triton_warmup", lambda *_: None)
    # What Triton's interpreter cannot run of the sampler, which is not ours.
    patch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *_, **__: None)
    in_torch = topk_topp_sampler.apply_top_k_top_p_pytorch
    patch.setattr(topk_topp_sampler, "apply_top_k_top_p_triton", in_torch)
    return {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY" if job.get("graphs") else "NONE",
        },
        "jit_monitor_mode": job.get("jit_monitor", "error"),
    }


def _stub_memory(patch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda *_: None,
        memory_reserved=lambda *_: 0,
        memory_stats=lambda *_: {},
        get_memory_info=lambda *_: (MEMORY, MEMORY),
    )
    for name, stub in vars(nothing).items():
        patch.setattr(torch.accelerator, name, stub)
    patch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "none")


def _stub_graphs(patch: pytest.MonkeyPatch) -> None:
    manager = cudagraph_utils.CudaGraphManager
    capture = manager.capture

    def noting(self: Any, create: Any, *args: Any, **kwargs: Any) -> None:
        def create_and_note(desc: Any, warmup: bool) -> Any:
            forward = create(desc, warmup=warmup)
            _Capturing.latest = [forward]
            return forward

        capture(self, create_and_note, *args, **kwargs)

    class Nothing:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    patch.setattr(manager, "capture", noting)
    patch.setattr(manager, "_capture_stream", lambda *_: None)
    patch.setattr(cudagraph_utils, "graph_capture", Nothing)
    patch.setattr(cudagraph_utils, "capture_pool", Nothing)
    patch.setattr(torch.cuda, "CUDAGraph", _Graph)
    patch.setattr(torch.cuda, "graph", _Capturing)
    patch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: True))
    patch.setattr(CpuPlatform, "graph_pool_handle", lambda self: object(), raising=False)
    patch.setattr(CpuPlatform, "_global_graph_pool", None)
    _Graph.replays = 0


def replays() -> int:
    """How often graphs were replayed since :func:`install`."""
    return _Graph.replays


def _watch(patch: pytest.MonkeyPatch, events: list[str]) -> None:
    """Note the steps of a start, by the functions of vLLM's that make them."""
    runner = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
    worker = "vllm.v1.worker.gpu_worker"
    steps = (
        *(f"{runner}.{name}" for name in ("profile_run", "profile_cudagraph_memory")),
        *(f"{runner}.{name}" for name in ("initialize_kv_cache", "capture_model")),
        f"{worker}.Worker.compile_or_warm_up_model",
        *(f"{worker}.{name}" for name in ("warmup_kernels", "freeze_gc_heap")),
        f"{worker}.enable_gpu_sync_check",
        "vllm.utils.jit_monitor.activate",
        "vllm_kvcompress.engine.step.session.Session.warm_up",
    )
    for path in steps:
        _note_calls(patch, path, events)
    # The process goes on when the engine has ended.
    patch.setattr(jit_monitor, "_active", False)
    patch.setattr(gpu_sync_debug, "_sync_check_enabled", False)
    patch.setattr(gc, "freeze", lambda: None)


def _note_calls(patch: pytest.MonkeyPatch, path: str, events: list[str]) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    original = getattr(owner, name)

    @functools.wraps(original)  # the check of the hooks looks inside
    def noting(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return original(*args, **kwargs)

    patch.setattr(owner, name, noting)

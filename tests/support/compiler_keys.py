"""What Triton's compiler tells launches of a kernel apart by, without a GPU.

A launch whose key was not seen before is compiled. The key has the constants, the types of the
arguments, and what Triton makes of their values: whether a pointer or a number is divisible by 16,
and whether a number is 1. Triton's own code says it, for a kernel that is interpreted too.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

TARGET = ("cuda", 90, 32)


@cache
def _binder(kernel: Any) -> Callable[..., Any]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    jitted = kernel
    if not isinstance(kernel, JITFunction):
        names = inspect.signature(JITFunction.__init__).parameters.keys() & kernel.kwargs.keys()
        jitted = JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in names})
    backend = CUDABackend(GPUTarget(*TARGET))
    bind: Callable[..., Any] = create_function_from_signature(
        jitted.signature, jitted.params, backend
    )
    return bind


def key_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return a launch's key: the kernel's name, then each parameter with what is special of it.

    "D" stands for divisible by 16; a value stands where a constant or a 1 is compiled in.

    Args:
        kernel: What ``triton.jit`` made, compiled or interpreted.
        args: Of the launch.
        kwargs: Of the launch.

    """
    bound, specialization, options = _binder(kernel)(*args, **kwargs)
    special = [f"{name}={kind}" for name, kind in zip(bound, specialization, strict=True)]
    return f"{kernel.fn.__module__}.{kernel.fn.__name__} {' '.join(special)} {options}"


def record_launches(patch: pytest.MonkeyPatch, seen: Callable[[str], Any]) -> None:
    """Call ``seen`` with the key of every launch of an interpreted kernel, before it runs.

    Args:
        patch: Ends it.
        seen: Takes the key.

    """
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recording(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        seen(key_of(kernel, args, kwargs))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    patch.setattr(InterpretedFunction, "run", recording)


def launch_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let whoever leaves the choice to the tensors' device launch the Triton kernels."""
    from kvcompress_kernels.dispatch import use_triton

    def wanted(_: Any, implementation: str) -> bool:
        return implementation != "torch"

    for name, module in list(sys.modules.items()):
        own = name.split(".")[0] in ("kvcompress_kernels", "vllm_kvcompress")
        if own and getattr(module, "use_triton", None) is use_triton:
            patch.setattr(module, "use_triton", wanted)

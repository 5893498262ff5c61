"""What Triton's compiler tells launches of a kernel apart by, without a GPU.

A launch whose key was not seen before is compiled. The key has the constants, the types of the
arguments, and what Triton makes of their values: whether a pointer or a number is divisible by 16,
and whether a number is 1. Triton's own code says it, for a kernel that is interpreted too.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

TARGET = ("cuda", 90, 32)


@cache
def _binder(kernel: Any) -> tuple[Any, Callable[..., Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    jitted = kernel
    if not isinstance(kernel, JITFunction):
        names = inspect.signature(JITFunction.__init__).parameters.keys() & kernel.kwargs.keys()
        jitted = JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in names})
    backend = CUDABackend(GPUTarget(*TARGET))
    return jitted, create_function_from_signature(jitted.signature, jitted.params, backend)


def key_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return a launch's key, after the kernel's name.

    Args:
        kernel: What ``triton.jit`` made, compiled or interpreted.
        args: Of the launch.
        kwargs: Of the launch.

    """
    _, bind = _binder(kernel)
    _, specialization, options = bind(*args, **kwargs)
    fn = kernel.fn
    return f"{fn.__module__}.{fn.__name__} {specialization} {options}"


def record_launches(patch: pytest.MonkeyPatch, kernel_type: type, seen: Callable[[str], Any]) -> None:
    """Call ``seen`` with the key of every launch, before it runs.

    Args:
        patch: Ends it.
        kernel_type: ``InterpretedFunction`` or ``JITFunction``.
        seen: Takes the key.

    """
    run = kernel_type.run  # type: ignore[attr-defined]

    def recording(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        seen(key_of(kernel, args, kwargs))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    patch.setattr(kernel_type, "run", recording)

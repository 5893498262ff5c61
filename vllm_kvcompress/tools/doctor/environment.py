"""What an environment has, looked at as a server's start looks at it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from vllm_kvcompress import __version__

GROUP = "vllm.general_plugins"
ENTRY_POINT = "vllm_kvcompress.engine.plugin:register"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        about: What was looked at.
        works: False: compression does not work because of it. None: worth knowing.
        text: What was found and, if it does not work, what to change.

    """

    about: str
    works: bool | None
    text: str


def findings() -> Iterator[Finding]:
    """Look at one thing after another; stops at what the rest needs."""
    yield Finding("package", True, f"vllm_kvcompress {__version__}")
    try:
        import vllm
    except ImportError as error:
        yield Finding("vLLM", False, f"cannot be imported ({error}); install vllm 0.32")
        return
    yield _version_of_vllm(vllm.__version__)
    for name in ("torch", "triton"):
        yield Finding(name, None, _installed(name))
    yield plugin()
    from vllm.platforms import current_platform

    works, text = _platform(current_platform)
    yield Finding("platform", works, text)
    if works:
        yield _attention(current_platform)
        yield _kernels(current_platform)
        yield from _variables(current_platform)


def plugin() -> Finding:
    """Whether vLLM's own processes load the plugin. Imports vLLM's list, and runs no plugin."""
    from vllm.plugins import load_plugins_by_group

    from vllm_kvcompress.engine.plugin import register

    names = sorted(e.name for e in entry_points(group=GROUP) if e.value == ENTRY_POINT)
    allowed = os.environ.get("VLLM_PLUGINS")
    said = "VLLM_PLUGINS is not set" if allowed is None else f"VLLM_PLUGINS={allowed!r}"
    if not names:
        text = "vLLM does not see it, only vllm_kvcompress.LLM works; install it with pip"
        return Finding("plugin", False, text)
    if any(found is register for found in load_plugins_by_group(GROUP).values()):
        return Finding("plugin", True, f"loaded by vLLM as {' or '.join(names)} ({said})")
    text = (
        f"not loaded by vLLM: {said} leaves it out, only vllm_kvcompress.LLM works; add "
        f"{names[0]} to VLLM_PLUGINS, or unset it"
    )
    return Finding("plugin", False, text)


def _version_of_vllm(found: str) -> Finding:
    from vllm_kvcompress.engine.checks import Unsupported, check_version

    try:
        check_version()
    except Unsupported as error:
        return Finding("vLLM", False, str(error))
    return Finding("vLLM", True, f"{found}, supported")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _platform(platform: Any) -> tuple[bool, str]:
    if platform.is_cpu():
        return True, f"CPU ({platform.get_cpu_architecture().name.lower()})"
    if platform.is_cuda_alike():
        capability = platform.get_device_capability()
        known = capability.as_version_str() if capability else "unknown"
        return True, f"{platform.get_device_name()}, compute capability {known}"
    if platform.is_unspecified():
        return False, "vLLM finds no device here; install vLLM's build for this machine"
    return False, f"{platform.device_type} is not supported; use vLLM on a GPU or its CPU build"


def _attention(platform: Any) -> Finding:
    if platform.is_cpu():
        return Finding("attention", True, "CPU_ATTN, block sizes that are multiples of 32")
    from vllm_kvcompress.engine.attention.backend_choice import serving_backends

    # What most models have; the choice for a model is made when it is served.
    names = serving_backends(platform.get_device_capability(), head_size=128)
    if names:
        return Finding("attention", True, f"{' or '.join(names)} for half precision, heads of 128")
    return Finding("attention", False, "no backend with per-layer tables serves heads of 128 here")


def _kernels(platform: Any) -> Finding:
    """Run one kernel on the device, and compare with torch on the CPU."""
    import torch

    from kvcompress_kernels.selection import top_tokens

    scores = torch.arange(64, dtype=torch.float32).remainder(7).view(2, 32)
    which = "torch, on the CPU" if platform.is_cpu() else f"Triton {_installed('triton')}"
    return _ran(
        lambda: torch.equal(
            top_tokens(scores.to(platform.device_type), 5).cpu(), top_tokens(scores, 5)
        ),
        which,
    )


def _ran(kernel: Callable[[], bool], which: str) -> Finding:
    try:
        right = kernel()
    except Exception as error:  # whatever stops it here, stops a server too: it is the finding
        reason = (str(error).splitlines() or [""])[0]
        return Finding("kernels", False, f"{which}: {type(error).__name__}: {reason}")
    return Finding("kernels", right, f"{which}{'' if right else ': wrong result'}")


def _variables(platform: Any) -> Iterator[Finding]:
    from vllm_kvcompress.tools.kv_space import VARIABLE, kv_space

    if platform.is_cpu():
        if space := kv_space():
            text = f"{VARIABLE}={space}: vLLM takes {space} GiB for the KV cache, whatever "
            yield Finding("variable", None, text + "--kv-cache-memory-bytes says")
    elif os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        text = "VLLM_USE_V2_MODEL_RUNNER=0: model runner V1 on a GPU is not supported; unset it"
        yield Finding("variable", False, text)

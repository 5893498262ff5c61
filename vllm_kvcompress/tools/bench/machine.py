"""Where and with what a figure was taken."""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from vllm_kvcompress import __version__


def processor() -> str:
    """Name of the CPU and the number of cores that this machine has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{os.cpu_count()}"


def device() -> str:
    """Name of what vLLM runs on; imports vLLM."""
    from vllm.platforms import current_platform

    return processor() if current_platform.is_cpu() else str(current_platform.get_device_name())


def hardware() -> str:
    """The GPU that torch computes on, or the CPU where it has none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def facts() -> dict[str, str]:
    """Date, machine, versions and the command; imports vLLM."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "vllm_kvcompress": __version__,
        "python": platform.python_version(),
        "command": shlex.join(["kvcompress", *sys.argv[1:]]),
    }

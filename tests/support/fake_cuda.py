"""vLLM's selection of attention backends as it is on a GPU, without one.

vLLM's own CUDA platform, with a compute capability that it is told, and FlashAttention of every
version that a CUDA build has. FlashInfer cannot be imported here; where it matters, a stand-in has
its place and takes every layer.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import vllm.platforms
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends import fa_utils, flash_attn, registry, triton_attn

FLASH = "vllm.vllm_flash_attn"
COMPILED = ("vllm._C_stable_libtorch", f"{FLASH}._vllm_fa2_C", f"{FLASH}._vllm_fa3_C")
"""What a CUDA build has compiled; nothing of it is called here."""

MODULES = (fa_utils, flash_attn, triton_attn)
"""Modules that have bound the platform under a name of their own."""


def become_cuda(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Make this process believe that it has a GPU of this capability, until the patch is undone."""
    for name in COMPILED:
        patch.setitem(sys.modules, name, ModuleType(name))
    cuda: Any = importlib.import_module("vllm.platforms.cuda")

    class FakeCuda(cuda.CudaPlatformBase):
        """A GPU that is asked for its capability and its name, and nothing else."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU"

    platform = FakeCuda()
    patch.setattr(vllm.platforms, "_current_platform", platform)
    for module in MODULES:
        patch.setattr(module, "current_platform", platform)
    # Imported anew with what is compiled in place, and forgotten when that goes.
    interface = f"{FLASH}.flash_attn_interface"
    for name in (FLASH, interface):
        patch.delitem(sys.modules, name, raising=False)
    flash_attention: Any = importlib.import_module(interface)
    patch.setattr(flash_attention, "FA4_AVAILABLE", True)
    for name in (FLASH, interface):
        patch.setitem(sys.modules, name, sys.modules.pop(name))
    # Bound by vLLM's module only where there is FlashAttention.
    patch.setattr(
        flash_attn, "flash_attn_supports_sinks", fa_utils.flash_attn_supports_sinks, raising=False
    )


class EagerFlashInfer(AttentionBackend):
    """FlashInfer at its most willing."""

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"

    @classmethod
    def validate_configuration(cls, *_: Any, **__: Any) -> list[str]:
        return []


def have_flashinfer(patch: pytest.MonkeyPatch) -> None:
    """Offer a FlashInfer that takes every layer."""
    path = f"{__name__}.EagerFlashInfer"
    patch.setitem(registry._ATTN_OVERRIDES, registry.AttentionBackendEnum.FLASHINFER, path)

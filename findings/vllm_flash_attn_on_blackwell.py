"""vLLM 0.32.0: on Blackwell FLASH_ATTN accepts layers that FlashAttention 2 cannot do.

Expected from ``validate_configuration``: a backend that says yes serves the layer. Seen, by vLLM's
own CUDA platform told that it is a B200 (compute capability 10.0): FLASH_ATTN takes heads of 512,
and heads of 256 with sinks, and makes their attention with FlashAttention 2, whose interface raises
"FA2 does not support s_aux" and whose kernels end at heads of 256 (read, not run: no GPU here).
Why: ``supports_head_size`` and ``supports_sink`` ask whether the GPU has version 4, not whether the
layer gets it. FlashInfer comes first there, so it takes --attention-backend FLASH_ATTN to see it.

    python -m findings.vllm_flash_attn_on_blackwell     (no GPU needed)

Ends with 0 as long as that is so, with 1 once it changes.
"""

import sys

import pytest
import torch

from tests.support.fake_cuda import become_cuda


def version_of(head_size: int, sinks: bool) -> int | None:
    """Version that an accepted layer's attention gets; None: it is not accepted."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = AttentionSelectorConfig(head_size, torch.bfloat16, "auto", None, has_sink=sinks)
    reasons = FlashAttentionBackend.validate_configuration(
        device_capability=DeviceCapability(10, 0), **layer._asdict()
    )
    if reasons:
        return None
    given = torch.zeros(1) if sinks else None
    made = FlashAttentionImpl(1, head_size, 1.0, 1, None, None, "auto", sinks=given)
    return made.vllm_flash_attn_version


def main() -> int:
    """Ask for both."""
    with pytest.MonkeyPatch.context() as patch:
        become_cuda(patch, (10, 0))
        found = {case: version_of(*case) for case in ((128, True), (512, False), (256, True))}
    for (head_size, sinks), version in found.items():
        print(f"heads of {head_size}{' with sinks' if sinks else ''}: version {version}")
    return 0 if found[512, False] == found[256, True] == 2 else 1


if __name__ == "__main__":
    sys.exit(main())

"""vLLM's attention backends with per-layer page tables, one module each.

A new one: a module here with a backend, a builder and an impl (see ``common.py`` for what they must
do), and a line in :data:`BACKENDS`.
"""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BACKENDS = {
    "CPU_ATTN": "vllm_kvcompress.engine.attention.cpu_attn.ArenaCPUBackend",
    "FLASH_ATTN": "vllm_kvcompress.engine.attention.flash_attn.ArenaFlashBackend",
    "TRITON_ATTN": "vllm_kvcompress.engine.attention.triton_attn.ArenaTritonBackend",
}
"""vLLM's name of a backend -> ours, imported only if vLLM chooses it."""

GPU_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""Those of them that a GPU can have."""

PLAIN_CACHES = ("auto", "bfloat16", "float16")
FP8_CACHES = ("fp8", "fp8_e4m3")
"""vLLM's names of the dtypes of caches that can be moved: as they are, and as bytes."""


def register_backends() -> None:
    """Put ours over vLLM's, in this process; idempotent."""
    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)

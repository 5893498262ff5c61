"""vLLM's attention backends with per-layer page tables, one module each.

A new one: a module here with a backend, a builder and an impl (see ``common.py`` for what they must
do), and a line in :data:`BACKENDS`.
"""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BACKENDS = {
    "CPU_ATTN": "vllm_kvcompress.engine.backends.cpu_attn.ArenaCPUBackend",
    "FLASH_ATTN": "vllm_kvcompress.engine.backends.flash_attn.ArenaFlashBackend",
    "TRITON_ATTN": "vllm_kvcompress.engine.backends.triton_attn.ArenaTritonBackend",
}
"""vLLM's name of a backend -> ours, imported only if vLLM chooses it."""


def register_backends() -> None:
    """Put ours over vLLM's, in this process; idempotent."""
    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)

"""The KV-cache spec that puts full-attention layers under the arena's block accounting."""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.engine.manager import ArenaManager
from vllm_kvcompress.engine.settings import planner_of


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """Full attention whose prompt is compressed into private blocks after its prefill."""

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of a row in the runner's block table: prompt, arena and growth blocks."""
        # The runner only ever appends, so the prompt's entries stay in the row after release.
        return planner_of(vllm_config, self.block_size).peak_blocks(max_len) + 1

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request of max_model_len needs at its peak, in one layer."""
        max_model_len = vllm_config.model_config.max_model_len
        blocks = planner_of(vllm_config, self.block_size).peak_blocks(max_model_len)
        return int(blocks * self.page_size_bytes)


def register_spec() -> None:
    """Make the spec known to this process's registry; idempotent."""
    # The registry stops at the first entry it finds, so vLLM's own specs must be there before.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, uniform_type_base_spec=FullAttentionSpec)


# A spec reaches the engine core by unpickling, which imports this module: the only moment at
# which that process can learn of it. The module is imported only when compression is on.
register_spec()

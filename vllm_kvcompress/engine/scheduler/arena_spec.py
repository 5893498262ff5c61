"""The KV-cache spec that puts full-attention layers under the arena's block accounting."""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.engine.hooks import wrap_once
from vllm_kvcompress.engine.model_layers import layers_of
from vllm_kvcompress.engine.scheduler.arena_manager import ArenaManager
from vllm_kvcompress.engine.settings import resolver_of


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """Full attention whose prompt is compressed into private blocks after its prefill."""

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of a row in the runner's block table: all blocks a request is ever given."""
        # The runner only ever appends, so the prompt's entries stay in the row after release.
        return resolver_of(vllm_config, self.block_size).row_blocks(max_len)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request needs at its peak, in one layer, whatever its prompt's length."""
        max_model_len = vllm_config.model_config.max_model_len
        blocks = resolver_of(vllm_config, self.block_size).default_planner.least_pool(max_model_len)
        return int(blocks * self.page_size_bytes)


def _count_compressed(original: Any) -> Any:
    """Let vLLM's line on maximum concurrency count what compressed requests hold."""

    def get_max_concurrency_for_kv_cache_config(
        vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> float:
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        arena = next((spec for spec in specs if isinstance(spec, ArenaSpec)), None)
        if arena is None:
            return float(original(vllm_config, kv_cache_config))
        planner = resolver_of(vllm_config, arena.block_size).default_planner
        layers, longest = layers_of(vllm_config), vllm_config.model_config.max_model_len
        reading = vllm_config.max_in_flight_tokens
        return planner.concurrency(
            longest,
            kv_cache_config.num_blocks - 1,
            window_group_peak=layers.window_group_blocks(arena.block_size, longest, reading),
            window_group_held=layers.window_group_blocks(
                arena.block_size, longest, planner.limits.lag + 1
            ),
        )

    return get_max_concurrency_for_kv_cache_config


def register_spec() -> None:
    """Make the spec known to this process's registry; idempotent."""
    # The registry stops at the first entry it finds, so vLLM's own specs must be there before.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, uniform_type_base_spec=FullAttentionSpec)
    wrap_once(kv_cache_utils, "get_max_concurrency_for_kv_cache_config", _count_compressed)


# A spec reaches the engine core by unpickling, which imports this module: the only moment at
# which that process can learn of it. The module is imported only when compression is on.
register_spec()

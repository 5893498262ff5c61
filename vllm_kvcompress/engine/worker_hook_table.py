"""What a worker uses of vLLM beside :mod:`.hook_table`: workers, runners and attention backends.

To move to another vLLM, run tests/engine/test_hooks.py first: it says what of this has changed.
"""

from vllm_kvcompress.engine.hooks import HookTable, Use

WRAP, OVERRIDE, CALL, SUBCLASS, READ = Use

_FORWARD = "self, layer, query, key, value, kv_cache, attn_metadata, ..."
_UPDATE_CACHE = "self, layer, key, value, kv_cache, slot_mapping"
_BUILD = "self, common_prefix_len, common_attn_metadata, fast_build"

WORKER_HOOKS: HookTable = {
    "vllm.platforms.cuda": {
        "CudaPlatformBase.get_valid_backends": (
            CALL,
            "device_capability=, attn_selector_config=, num_heads=",
        ),
        "_BackendCandidate": (READ, "backend priority"),
    },
    "vllm.v1.worker.cpu_worker": {
        "CPUWorker": (SUBCLASS, "vllm_config model_runner"),
        "CPUWorker.compile_or_warm_up_model": (OVERRIDE, "self"),
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker": (
            SUBCLASS,
            (
                "vllm_config model_config cache_config model_runner peak_activation_memory "
                "available_kv_cache_memory_bytes"
            ),
        ),
        "Worker.load_model": (OVERRIDE, "self, ..."),
        "Worker.get_kv_cache_spec": (OVERRIDE, "self"),
        "Worker.initialize_from_config": (OVERRIDE, "self, kv_cache_config"),
        "Worker.determine_available_memory": (OVERRIDE, "self"),
        "Worker.compile_or_warm_up_model": (OVERRIDE, "self"),
        "Worker._maybe_get_memory_pool_context": (CALL, "self, tag="),
        "Worker.execute_model": (OVERRIDE, "self, scheduler_output"),
        "Worker.sample_tokens": (OVERRIDE, "self, ..."),
    },
    "vllm.compilation.caching": {"aot_compile_hash_factors": (WRAP, "vllm_config")},
    "vllm.compilation.backends": {
        "VllmBackend": (READ, "vllm_config"),
        "VllmBackend.__call__": (WRAP, "self, ..."),
    },
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": (READ, "input_batch attn_groups discard_request_mask"),
    },
    "vllm.v1.worker.gpu_input_batch": {"InputBatch": (READ, "req_ids num_reqs generators")},
    "vllm.v1.worker.gpu.model_runner": {
        "GPUModelRunner": (READ, "model_state attn_groups block_tables"),
        "GPUModelRunner.gather_batch_req_state": (WRAP, "self, ..."),
    },
    "vllm.v1.worker.gpu.model_states.default": {
        "DefaultModelState.prepare_attn": (WRAP, "self, input_batch, cudagraph_mode, ..."),
    },
    "vllm.v1.worker.gpu.block_table": {"BlockTables": (READ, "input_block_tables")},
    "vllm.v1.worker.gpu.input_batch": {"InputBatch": (READ, "req_ids")},
    "vllm.v1.attention.backends.cpu_attn": {
        "CPUAttentionBackend": (SUBCLASS, ""),
        "CPUAttentionBackend.get_impl_cls": (OVERRIDE, ""),
        "CPUAttentionBackend.get_supported_head_sizes": (CALL, ""),
        "CPUAttentionBackend.get_builder_cls": (OVERRIDE, ""),
        "CPUAttentionMetadata": (
            READ,
            (
                "block_table slot_mapping seq_lens max_seq_len scheduler_metadata query_start_loc "
                "causal dynamic_causal"
            ),
        ),
        "CPUAttentionMetadataBuilder": (
            SUBCLASS,
            "num_heads num_kv_heads head_dim dtype window_size isa kv_cache_dtype",
        ),
        "CPUAttentionMetadataBuilder.build": (OVERRIDE, _BUILD),
        "CPUAttentionBackendImpl": (SUBCLASS, "kv_cache_dtype num_heads alibi_slopes"),
        "CPUAttentionBackendImpl.forward": (OVERRIDE, _FORWARD),
        "CPUAttentionBackendImpl.do_kv_cache_update": (OVERRIDE, _UPDATE_CACHE),
    },
    "vllm.envs": {"VLLM_CPU_ATTN_SPLIT_KV": (READ, "")},
    "vllm._custom_ops": {
        "cpu_attn_get_scheduler_metadata": (
            CALL,
            (
                "num_reqs=, num_heads=, num_kv_heads=, head_dim=, seq_lens=, dtype=, "
                "query_start_loc=, causal=, sliding_window_size=, isa=, enable_kv_split=, "
                "dynamic_causal=, kv_cache_dtype="
            ),
        ),
        "cpu_attn_reshape_and_cache": (
            CALL,
            (
                "key, value, key_cache, value_cache, slot_mapping, isa, k_scale=, v_scale=, "
                "kv_cache_dtype="
            ),
        ),
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionBackend": (SUBCLASS, "forward_includes_kv_cache_update"),
        "FlashAttentionBackend.get_impl_cls": (OVERRIDE, ""),
        "FlashAttentionBackend.get_builder_cls": (OVERRIDE, ""),
        "FlashAttentionMetadata": (
            READ,
            "block_table seq_lens slot_mapping max_seq_len scheduler_metadata",
        ),
        "FlashAttentionMetadataBuilder": (SUBCLASS, ""),
        "FlashAttentionMetadataBuilder.build": (OVERRIDE, _BUILD),
        "FlashAttentionMetadataBuilder.build_for_cudagraph_capture": (
            OVERRIDE,
            "self, common_attn_metadata",
        ),
        "FlashAttentionImpl": (
            SUBCLASS,
            "kv_cache_dtype num_heads alibi_slopes vllm_flash_attn_version",
        ),
        "FlashAttentionImpl.forward": (OVERRIDE, _FORWARD),
        "FlashAttentionImpl.do_kv_cache_update": (CALL, _UPDATE_CACHE),
    },
    "vllm.v1.attention.backends.triton_attn": {
        "TritonAttentionBackend": (SUBCLASS, "forward_includes_kv_cache_update"),
        "TritonAttentionBackend.customize_spec": (OVERRIDE, "spec"),
        "TritonAttentionBackend.get_impl_cls": (OVERRIDE, ""),
        "TritonAttentionBackend.get_builder_cls": (OVERRIDE, ""),
        "TritonAttentionMetadata": (READ, "block_table seq_lens slot_mapping max_seq_len"),
        "TritonAttentionMetadataBuilder": (SUBCLASS, ""),
        "TritonAttentionMetadataBuilder.build": (OVERRIDE, _BUILD),
        "TritonAttentionMetadataBuilder.build_for_cudagraph_capture": (
            OVERRIDE,
            "self, common_attn_metadata",
        ),
        "TritonAttentionImpl": (SUBCLASS, "kv_cache_dtype num_heads alibi_slopes"),
        "TritonAttentionImpl.forward": (OVERRIDE, _FORWARD),
        "TritonAttentionImpl.do_kv_cache_update": (CALL, _UPDATE_CACHE),
    },
}
"""What a worker checks, of the modules that it has loaded: others are for other devices."""

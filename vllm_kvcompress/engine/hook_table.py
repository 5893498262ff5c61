"""Everything of vLLM that engine/ wraps, overrides, calls or reads, with what it relies on.

To move to another vLLM, run tests/engine/test_hooks.py first: it says what of this has changed.
"""

from vllm_kvcompress.engine.hooks import HookTable, Use

WRAP, OVERRIDE, CALL, SUBCLASS, READ = Use

_BLOCKS_TO_ALLOCATE = (
    "total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, "
    "apply_admission_cap, prefill_end"
)
_CACHE_BLOCKS = "self, request, num_tokens, retention_interval, *, replay_boundaries"

HOOKS: HookTable = {
    "vllm": {"LLM": (SUBCLASS, ""), "__version__": (READ, "")},
    "vllm.entrypoints.llm": {"LLM.__init__": (OVERRIDE, "self, model, ...")},
    "vllm.engine.arg_utils": {
        "EngineArgs": (READ, "additional_config"),
        "EngineArgs.add_cli_args": (WRAP, "parser"),
        "EngineArgs.from_cli_args": (WRAP, "args"),
        "EngineArgs.create_engine_config": (WRAP, "self, ..."),
    },
    "vllm.config": {
        "VllmConfig": (
            READ,
            (
                "additional_config model_config cache_config parallel_config scheduler_config "
                "attention_config compilation_config kv_transfer_config speculative_config "
                "use_v2_model_runner max_in_flight_tokens max_concurrent_batches quant_config"
            ),
        ),
        "ModelConfig": (
            READ,
            (
                "runner_type is_encoder_decoder use_mla is_attention_free is_hybrid "
                "is_mm_prefix_lm uses_alibi hf_text_config attention_chunk_size max_model_len "
                "dtype served_model_name architectures model_arch_config"
            ),
        ),
        "ModelConfig.get_total_num_hidden_layers": (CALL, "self"),
        "ModelConfig.get_sliding_window": (CALL, "self"),
        "ModelConfig.get_total_num_kv_heads": (CALL, "self"),
        "ModelConfig.get_num_attention_heads": (CALL, "self, parallel_config"),
        "ModelConfig.get_num_kv_heads": (CALL, "self, parallel_config"),
        "ModelConfig.get_head_size": (CALL, "self"),
        "CacheConfig": (
            READ,
            (
                "block_size user_specified_block_size cache_dtype num_gpu_blocks "
                "kv_cache_memory_bytes"
            ),
        ),
        "ParallelConfig": (
            READ,
            (
                "worker_cls tensor_parallel_size pipeline_parallel_size data_parallel_size "
                "data_parallel_size_local data_parallel_rank_local local_engines_only "
                "decode_context_parallel_size prefill_context_parallel_size enable_dbo"
            ),
        ),
        "SchedulerConfig": (
            READ,
            (
                "scheduler_cls async_scheduling max_num_seqs max_num_batched_tokens "
                "max_num_scheduled_tokens long_prefill_token_threshold "
                "disable_hybrid_kv_cache_manager"
            ),
        ),
        "AttentionConfig": (READ, "backend backend_per_kind"),
        "CompilationConfig": (READ, "cudagraph_mode static_forward_context"),
        "CUDAGraphMode": (READ, "FULL"),
        "set_current_vllm_config": (CALL, "vllm_config"),
        "get_current_vllm_config_or_none": (CALL, ""),
    },
    "vllm.exceptions": {"VLLMValidationError": (CALL, "message")},
    "vllm.logger": {"init_logger": (CALL, "name")},
    "vllm.v1.engine": {
        "EngineCoreOutputs": (READ, ""),
        "EngineCoreRequest": (
            READ,
            "prompt_token_ids prompt_embeds sampling_params resumable",
        ),
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor": (READ, "vllm_config"),
        "InputProcessor.process_inputs": (WRAP, "self, ..."),
    },
    "vllm.v1.request": {
        "Request": (
            READ,
            (
                "request_id sampling_params num_prompt_tokens num_tokens num_computed_tokens "
                "num_in_flight_tokens num_preemptions block_hashes max_tokens resumable"
            ),
        ),
    },
    "vllm.v1.outputs": {
        "ModelRunnerOutput": (READ, ""),
        "EMPTY_MODEL_RUNNER_OUTPUT": (READ, ""),
        "AsyncModelRunnerOutput": (READ, ""),
        "AsyncModelRunnerOutput.get_output": (WRAP, "self"),
    },
    # --- the scheduler's side --------------------------------------------------------------------
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": (
            READ,
            (
                "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens "
                "total_num_scheduled_tokens finished_req_ids preempted_req_ids"
            ),
        ),
        "NewRequestData": (READ, "req_id prompt_len block_ids num_computed_tokens sampling_params"),
        "CachedRequestData": (READ, "req_ids resumed_req_ids new_block_ids num_computed_tokens"),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler": (
            SUBCLASS,
            (
                "vllm_config requests running max_model_len kv_cache_manager "
                "grammar_compile_error_reqs"
            ),
        ),
        "Scheduler.__init__": (OVERRIDE, "self, ..."),
        "Scheduler.add_request": (OVERRIDE, "self, request"),
        "Scheduler._handle_blocked_waiting_request": (OVERRIDE, "self, request"),
        "Scheduler.schedule": (OVERRIDE, "self, throttle_prefills"),
        "Scheduler.update_from_output": (OVERRIDE, "self, scheduler_output, model_runner_output"),
        "Scheduler.make_stats": (OVERRIDE, "self, ..."),
        "Scheduler._get_local_prefix_cache_hit": (OVERRIDE, "self, request"),
        "Scheduler._reserve_prefill_lookahead": (
            OVERRIDE,
            "self, request, num_computed_tokens, num_new_tokens",
        ),
    },
    "vllm.v1.core.sched.async_scheduler": {
        "AsyncScheduler": (SUBCLASS, ""),
        "AsyncScheduler.__init__": (OVERRIDE, "self, ..."),
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "FullAttentionManager": (SUBCLASS, "block_pool block_size req_to_blocks"),
        "FullAttentionManager.__init__": (OVERRIDE, "self, ..."),
        "FullAttentionManager.get_num_blocks_to_allocate": (
            OVERRIDE,
            f"self, request_id, num_tokens, new_computed_blocks, {_BLOCKS_TO_ALLOCATE}",
        ),
        "FullAttentionManager.allocate_new_blocks": (
            OVERRIDE,
            "self, request_id, num_tokens, num_tokens_main_model",
        ),
        "FullAttentionManager.remove_skipped_blocks": (
            OVERRIDE,
            "self, request_id, processed_computed_tokens, num_prompt_tokens",
        ),
        "FullAttentionManager.cache_blocks": (OVERRIDE, _CACHE_BLOCKS),
        "FullAttentionManager.pop_blocks_for_free": (OVERRIDE, "self, request_id"),
        # Groups beside the arena's.
        "SlidingWindowManager": (
            READ,
            (
                "block_size req_to_blocks sliding_window max_admission_blocks_per_request "
                "enable_caching"
            ),
        ),
        "SlidingWindowManager.get_num_blocks_to_allocate": (
            CALL,
            f"self, request_id, num_tokens, new_computed_blocks, {_BLOCKS_TO_ALLOCATE}",
        ),
        "SlidingWindowManager.cache_blocks": (
            CALL,
            "self, request, num_tokens, retention_interval=, replay_boundaries=",
        ),
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator": (READ, "single_type_managers retention_interval"),
        "KVCacheCoordinator.get_num_blocks_to_allocate": (
            WRAP,
            (
                "self, request_id, num_tokens, new_computed_blocks, num_encoder_tokens, "
                + _BLOCKS_TO_ALLOCATE
            ),
        ),
        "KVCacheCoordinator.allocate_new_blocks": (WRAP, "self, request_id, ..."),
        "KVCacheCoordinator.remove_skipped_blocks": (
            WRAP,
            "self, request_id, processed_computed_tokens, num_prompt_tokens",
        ),
        "KVCacheCoordinator.cache_blocks": (WRAP, "self, request, num_computed_tokens"),
        "KVCacheCoordinator.find_longest_cache_hit": (
            CALL,
            "self, block_hashes, max_cache_hit_length",
        ),
        "KVCacheCoordinator.get_num_cacheable_tokens": (
            CALL,
            "self, num_computed_tokens, kv_cache_group_id",
        ),
    },
    "vllm.v1.core.kv_cache_manager": {
        "KVCacheBlocks": (READ, "blocks"),
        "KVCacheManager": (READ, "coordinator watermark_blocks"),
        "KVCacheManager.create_kv_cache_blocks": (CALL, "self, blocks"),
        "KVCacheManager.remove_skipped_blocks": (
            CALL,
            "self, request_id, processed_computed_tokens",
        ),
    },
    "vllm.v1.core.block_pool": {
        "BlockPool": (READ, "num_gpu_blocks"),
        "BlockPool.free_blocks": (CALL, "self, ordered_blocks"),
        "BlockPool.get_num_free_blocks": (CALL, "self"),
    },
    "vllm.v1.core.kv_cache_utils": {
        "KVCacheBlock": (READ, "block_id ref_cnt is_null block_hash"),
        "get_max_concurrency_for_kv_cache_config": (WRAP, "vllm_config, kv_cache_config"),
    },
    "vllm.v1.kv_cache_spec_registry": {
        "KVCacheSpecRegistry": (READ, ""),
        "KVCacheSpecRegistry._ensure_registered": (CALL, ""),
        "KVCacheSpecRegistry.register": (
            CALL,
            "kvcache_spec_cls, manager_class, uniform_type_base_spec=",
        ),
    },
    "vllm.v1.kv_cache_interface": {
        "KVCacheConfig": (READ, "num_blocks kv_cache_groups"),
        "KVCacheGroupSpec": (READ, "layer_names kv_cache_spec"),
        "KVCacheSpec": (READ, "block_size page_size_bytes"),
        "AttentionSpec": (READ, ""),
        "SlidingWindowSpec": (READ, ""),
        "FullAttentionSpec": (
            SUBCLASS,
            "block_size page_size_bytes sliding_window attention_chunk_size non_causal",
        ),
        "FullAttentionSpec.max_num_blocks_per_req": (OVERRIDE, "self, vllm_config, max_len"),
        "FullAttentionSpec.max_memory_usage_bytes": (OVERRIDE, "self, vllm_config"),
        "replace_as": (CALL, "spec, target_cls"),
    },
    # --- figures ---------------------------------------------------------------------------------
    "vllm.v1.metrics.stats": {"SchedulerStats": (READ, "kv_connector_stats")},
    "vllm.v1.metrics.loggers": {"PrometheusStatLogger": (READ, "_kv_connector_cls")},
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics": {
        "KVConnectorLogging": (READ, ""),
        "KVConnectorLogging.observe": (WRAP, "self, transfer_stats_data"),
        "KVConnectorProm": (SUBCLASS, ""),
        "KVConnectorProm.__init__": (
            OVERRIDE,
            "self, vllm_config, labelnames, per_engine_labelvalues",
        ),
        "KVConnectorProm.observe": (OVERRIDE, "self, transfer_stats_data, engine_idx"),
    },
    # --- the choice of an attention backend ------------------------------------------------------
    "vllm.platforms": {"current_platform": (READ, "is_cuda is_fp8_fnuz get_device_capability")},
    "vllm.v1.attention.selector": {
        # With the attribute cache_clear.
        "_cached_get_attn_backend": (
            WRAP,
            "backend, attn_selector_config, num_heads, ...",
        ),
        "AttentionSelectorConfig": (
            READ,
            "head_size dtype kv_cache_dtype block_size has_sink has_sliding_window",
        ),
    },
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": (READ, "CPU_ATTN FLASH_ATTN TRITON_ATTN get_class"),
        "register_backend": (CALL, "backend, class_path"),
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend.customize_spec": (OVERRIDE, "spec"),
        "AttentionBackend.get_impl_cls": (CALL, ""),
        "AttentionBackend.validate_configuration": (
            CALL,
            (
                "device_capability=, head_size=, dtype=, kv_cache_dtype=, block_size=, use_mla=, "
                "has_sink=, use_sparse=, use_mm_prefix=, use_per_head_quant_scales=, attn_type="
            ),
        ),
        "CommonAttentionMetadata": (
            READ,
            (
                "num_reqs seq_lens query_start_loc query_start_loc_cpu block_table_tensor "
                "slot_mapping max_seq_len seq_lens_cpu_upper_bound"
            ),
        ),
    },
}
"""What the process that reads the flags can check: it imports nearly all of it anyway."""

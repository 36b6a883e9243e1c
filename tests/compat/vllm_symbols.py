"""Every symbol of vLLM that proxy_vllm relies on beyond what it imports: the table of the tests.

Add a line with the code that needs it. Names are looked up in a class and in those that it inherits
from: methods, properties, fields, and attributes that some method of theirs sets.
"""

# vLLM class or NamedTuple -> our file -> names that it reads, sets or calls.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "vllm.lora.model_manager:LRUCacheLoRAModelManager": {
        "adapters/manager.py": "device max_num_seqs modules punica_wrapper_mapping"
        " supported_lora_modules"
    },
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager": {
        "adapters/manager.py": "_manager_cls create_lora_manager"
    },
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": {
        "adapters/cpu_products.py": "_token_lora_indices"
    },
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": {
        "adapters/cpu_products.py": "lora_a_stacked lora_b_stacked",
        "adapters/manager.py": "punica_wrapper",
    },
    "vllm.lora.peft_helper:PEFTHelper": {
        "adapters/check.py": "from_dict get_rank_and_scaling validate_legal"
    },
    "vllm.config:LoRAConfig": {
        "adapters/check.py": "max_lora_rank target_modules",
        "member_configs.py": "lora_dtype",
        "speculator.py": "max_loras",
    },
    "vllm.v1.worker.gpu.lora_utils:LoraState": {
        "model_runner.py": "lora_requests make_lora_inputs"
    },
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator": {
        "spec_decode/speculator.py": "_build_uniform_attn_metadata _build_uniform_batch_dp_sync"
        " _prepare_eplb_forward _update_draft_decode_metadata attn_groups block_tables"
        " draft_attn_layer_names draft_max_seq_len draft_tokens idx_mapping input_buffers"
        " kv_cache_config max_model_len max_num_reqs model model_state num_speculative_steps seeds"
        " supports_decode_metadata_update temperature use_fp64_gumbel"
    },
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils"
    ":SpeculatorCudaGraphManager": {
        "spec_decode/speculator.py": "_capture_descs capture dispatch run_fullgraph"
        " specialize_spec_tokens"
    },
    "vllm.v1.spec_decode.draft_model:DraftModelProposer": {
        "spec_decode/v1_runner.py": "_draft_attn_layer_names _get_slot_mapping arange block_size"
        " hidden_states input_ids inputs_embeds kv_cache_gid positions token_arange_np"
    },
    "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor": {
        "spec_decode/v1_runner.py": "min_toks"
    },
    "vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor": {
        "spec_decode/v1_runner.py": "biases"
    },
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": {
        "spec_decode/v1_runner.py": "_state"
    },
    "vllm.v1.engine.async_llm:AsyncLLM": {
        "remote_base/async_llm.py": "engine_core output_handler output_processor vllm_config",
    },
    "vllm.v1.engine.output_processor:OutputProcessor": {
        "remote_base/async_llm.py": "abort_requests request_states",
        "explain/front_end.py": "request_states tokenizer",
    },
    "vllm.v1.engine.logprobs:LogprobsProcessor": {
        "explain/front_end.py": "_correct_decoded_token _get_sampled_context_ids"
        " cumulative_logprob logprobs num_logprobs tokenizer"
    },
    "vllm.v1.outputs:LogprobsTensors": {
        "explain/columns.py": "logprob_token_ids logprobs selected_token_ranks"
    },
    "vllm.v1.outputs:LogprobsLists": {"explain/columns.py": "logprob_token_ids logprobs"},
    "vllm.v1.engine.output_processor:RequestState": {
        "remote_base/async_llm.py": "parent_req queue",
        "remote_base/reports.py": "parent_req request_index",
        "explain/front_end.py": "logprobs_processor",
    },
    "vllm.v1.engine.parallel_sampling:ParentRequest": {"remote_base/reports.py": "n"},
    "vllm.v1.engine.core_client:AsyncMPClient": {
        "server/metrics.py": "call_utility_all_async engine_ranks_managed",
        "remote_base/engine_core.py": "abort_requests_async add_request_async get_output_async"
        " shutdown",
    },
    "vllm.v1.engine.core_client:SyncMPClient": {
        "remote_base/engine_core.py": "abort_requests add_request get_output shutdown",
    },
    "vllm.v1.engine.input_processor:InputProcessor": {
        "spec_decode/admission.py": "speculative_config"
    },
    "vllm.config:VllmConfig": {
        "member_configs.py": "additional_config compilation_config compute_hash"
        " get_quantization_config load_config model_config parallel_config quant_config",
        "engine_config.py": "compilation_config parallel_config",
        "model.py": "parallel_config",
        "model_runner.py": "max_concurrent_batches",
        "model_state.py": "speculative_config watermark_config",
        "own_prompts/prompts.py": "compilation_config kv_transfer_config scheduler_config"
        " use_v2_model_runner",
        "own_prompts/scheduler.py": "cache_config",
    },
    "vllm.config:ModelConfig": {
        "member_configs.py": "allow_deprecated_quantization compute_hash config_format"
        " disable_sliding_window dtype enforce_eager hf_overrides hf_text_config hf_token"
        " max_model_len maybe_untie_word_embeddings model seed skip_tokenizer_init tokenizer_mode"
        " trust_remote_code verify_with_parallel_config",
        "engine_config.py": "architecture code_revision config_format dtype get_hidden_size"
        " hf_config hf_config_path is_attention_free is_hybrid is_prefix_caching_supported"
        " revision",
        "model.py": "get_vocab_size",
        "same_weights.py": "is_moe",
        "validate.py": "get_total_num_kv_heads is_attention_free is_diffusion is_encoder_decoder"
        " is_hybrid model_arch_config runner_type tokenizer use_mla",
        "members.py": "disable_sliding_window get_sliding_window hf_text_config",
        "batch/generator.py": "get_diff_sampling_param",
    },
    "vllm.transformers_utils.model_arch_config_convertor:ModelArchitectureConfig": {
        "validate.py": "total_num_attention_heads"
    },
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat": {
        "batch/openai_lines.py": "_effective_chat_template_kwargs _make_parser"
        " chat_completion_full_generator parser_cls"
    },
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion": {
        "batch/openai_lines.py": "request_output_to_completion_response"
    },
    "vllm.config:ParallelConfig": {
        "model.py": "pipeline_parallel_size",
        "own_prompts/prompts.py": "decode_context_parallel_size enable_expert_parallel"
        " prefill_context_parallel_size use_ubatching",
    },
    "vllm.config:LoadConfig": {"worker.py": "load_format"},
    "vllm.config:CompilationConfig": {
        "adapters/cpu_products.py": "inductor_compile_config mode",
        "own_prompts/prompts.py": "mode",
        "runner.py": "cudagraph_capture_sizes",
    },
    "vllm.config.compilation:PassConfig": {"engine_config.py": "fuse_allreduce_rms"},
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig": {
        "quantization.py": "get_quant_method online_quantization_config packed_modules_mapping"
    },
    "vllm.config:SchedulerConfig": {
        "batch/generator.py": "max_num_seqs",
        "own_prompts/prompts.py": "scheduler_cls",
        "own_prompts/scheduler.py": "async_scheduling",
    },
    "vllm.config:CacheConfig": {
        "own_prompts/scheduler.py": "prefix_caching_hash_algo",
        "members.py": "sliding_window",
        "engine_config.py": "enable_prefix_caching",
        "kv_layout.py": "block_size mamba_block_size mamba_cache_mode mamba_page_size_padded"
        " num_gpu_blocks_override",
    },
    "vllm.forward_context:ForwardContext": {"model.py": "cudagraph_runtime_mode slot_mapping"},
    "vllm.renderers.online_renderer:OnlineRenderer": {
        "admission.py": "effective_chat_template_kwargs exclude_tools_when_tool_choice_none"
    },
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": {
        "admission.py": "add_special_tokens messages tool_choice tools"
    },
    "vllm.sequence:IntermediateTensors": {"model.py": "items tensors"},
    "vllm.distributed.parallel_state:GroupCoordinator": {
        "heads.py": "device_group rank_in_group world_size",
        "model.py": "is_last_rank",
        "cpu_worker.py": "is_first_rank",
    },
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": {
        "heads.py": "num_embeddings_per_partition org_vocab_size quant_method"
    },
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": {
        "heads.py": "head_dtype scale soft_cap"
    },
    "vllm.model_executor.layers.attention:Attention": {
        "attention.py": "attn_backend impl sliding_window"
    },
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": {
        "attention.py": "get_attn_backend"
    },
    "vllm.v1.attention.backend:AttentionBackend": {"attention.py": "get_builder_cls"},
    "vllm.model_executor.custom_op:CustomOp": {"cpu_rotary.py": "_forward_method"},
    "vllm.v1.kv_cache_interface:AttentionSpec": {
        "kv_layout.py": "block_size max_memory_usage_bytes unpadded_page_size_bytes"
    },
    "vllm.v1.kv_cache_interface:SlidingWindowMLASpec": {
        "kv_layout.py": "bounded_replay extra_retained_tokens sliding_window"
    },
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": {
        "kv_layout.py": "attention_chunk_size"
    },
    "vllm.v1.kv_cache_interface:MambaSpec": {"kv_layout.py": "real_page_size_bytes"},
    "vllm.v1.kv_cache_interface:KVCacheConfig": {
        "worker.py": "kv_cache_groups num_blocks",
    },
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": {
        "worker.py": "kv_cache_spec",
        "own_prompts/inputs.py": "layer_names",
    },
    "vllm.v1.kv_cache_interface:FullAttentionSpec": {
        "worker.py": "block_size",
        "members.py": "page_size_bytes",
    },
    "vllm.v1.worker.gpu_worker:Worker": {
        "worker.py": "model_runner rank use_v2_model_runner vllm_config"
    },
    "vllm.v1.worker.cpu_worker:CPUWorker": {"cpu_worker.py": "device model_runner"},
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner": {
        "cpu_worker.py": "device discard_request_mask execute_model_state input_batch"
        " intermediate_tensors max_num_tokens model model_config query_start_loc requests",
        "worker.py": "get_model",
    },
    "vllm.v1.worker.gpu_input_batch:InputBatch": {
        "cpu_worker.py": "generators num_reqs req_ids",
        "spec_decode/v1_runner.py": "_make_sampling_metadata logitsprocs req_output_token_ids"
        " sampling_metadata thinking_budget_state_holder",
    },
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": {"cpu_worker.py": "sampling_params"},
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState": {
        "cpu_worker.py": "sample_hidden_states spec_decode_metadata"
    },
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": {
        "cpu_worker.py": "num_draft_tokens",
        "explain/v1_runner.py": "num_draft_tokens",
    },
    "vllm.v1.utils:CpuGpuBuffer": {"cpu_worker.py": "np"},
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": {
        "runner.py": "batch_sharder compilation_config cudagraph_manager device max_num_reqs model"
        " model_state req_states sampler structured_outputs_worker vllm_config",
        "worker.py": "get_model",
    },
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": {"runner.py": "needs_capture pool"},
    "vllm.v1.worker.gpu.model_runner:BatchReqState": {
        "runner.py": "_replace decode_graph_eligible idx_mapping_np req_ids"
    },
    "vllm.v1.worker.gpu.states:RequestState": {
        "runner.py": "num_computed_tokens_np",
        "sampler.py": "prefill_len",
    },
    "vllm.v1.worker.gpu.structured_outputs:StructuredOutputsWorker": {
        "runner.py": "apply_grammar_bitmask"
    },
    "vllm.v1.core.sched.output:GrammarOutput": {
        "runner.py": "grammar_bitmask structured_output_request_ids"
    },
    "vllm.v1.worker.gpu.input_batch:InputBatch": {
        "runner.py": "logits_indices num_draft_tokens num_reqs",
        "sampler.py": "cu_num_logits cu_num_logits_np expanded_idx_mapping expanded_local_pos"
        " idx_mapping idx_mapping_np num_draft_tokens_per_req num_reqs_after_padding"
        " req_ids seq_lens seq_lens_cpu_upper_bound",
        "row_buffers.py": "expanded_idx_mapping logits_indices positions",
        "model_state.py": "num_tokens_after_padding query_start_loc",
        "own_prompts/inputs.py": "has_prefill input_ids is_prefilling_np"
        " num_computed_prefill_tokens_np num_computed_tokens_np num_scheduled_tokens"
        " num_tokens prefill_len_np prefill_runs_as_decode_np query_start_loc_np",
    },
    "vllm.v1.worker.gpu.sample.sampler:Sampler": {
        "sampler.py": "compute_nans logits_processors logprob_token_ids_state logprobs_mode"
        " needs_logits_processing req_states return_sampling_mask sampling_states"
        " num_speculative_tokens thinking_budget_state trace_replay_state use_fp64_gumbel",
    },
    "vllm.v1.worker.gpu.sample.states:SamplingStates": {
        "sampler.py": "max_num_reqs num_logprobs vocab_size",
        "row_buffers.py": "min_p seeds temperature top_k top_p",
    },
    "vllm.v1.worker.gpu.sample.logit_bias:LogitBiasState": {"sampler.py": "use_logit_bias"},
    "vllm.v1.worker.gpu.sample.penalties:PenaltiesState": {"sampler.py": "use_penalty"},
    "vllm.v1.worker.gpu.sample.bad_words:BadWordsState": {"sampler.py": "num_bad_words"},
    "vllm.v1.worker.gpu.sample.thinking_budget:ThinkingBudgetState": {
        "sampler.py": "use_thinking_budget"
    },
    "vllm.v1.worker.gpu.sample.logprob:LogprobTokenIdsState": {"sampler.py": "max_num_token_ids"},
    "vllm.v1.worker.gpu.sample.output:SamplerOutput": {
        "sampler.py": "logprobs_tensors num_nans num_rejected num_sampled sampled_token_ids"
    },
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": {
        "model_state.py": "copy_to_uva gpu np",
    },
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": {
        "model_state.py": "max_num_reqs max_num_tokens model supports_prompt_embeds vllm_config"
    },
    "vllm.v1.core.sched.output:NewRequestData": {
        "model_state.py": "prompt_token_ids req_id sampling_params"
    },
    "vllm.v1.attention.backend:AttentionCGSupport": {"model_state.py": "UNIFORM_BATCH"},
    "vllm.config.compilation:CUDAGraphMode": {"model_state.py": "FULL NONE"},
    "vllm.v1.worker.gpu.block_table:BlockTables": {
        "own_prompts/inputs.py": "block_sizes_tensor block_table_ptrs block_table_strides"
        " compute_slot_mappings slot_mapping_enabled"
    },
    "vllm.v1.worker.utils:AttentionGroup": {"own_prompts/inputs.py": "layer_names"},
    "vllm.v1.core.sched.scheduler:Scheduler": {
        "own_prompts/scheduler.py": "hash_block_size max_model_len requests vllm_config",
        "spec_decode/scheduler.py": "dynamic_sd_lookup num_spec_tokens requests",
    },
    "vllm.v1.core.sched.output:SchedulerOutput": {
        "own_prompts/scheduler.py": "scheduled_new_reqs",
        "worker.py": "num_spec_tokens_to_schedule total_num_scheduled_tokens",
        "spec_decode/scheduler.py": "num_scheduled_tokens num_spec_tokens_to_schedule"
        " scheduled_spec_decode_tokens total_num_scheduled_tokens",
    },
    "vllm.v1.request:Request": {
        "remote_base/engine_core.py": "append_output_token_ids from_engine_core_request"
        " get_finished_reason stop_reason",
        "own_prompts/scheduler.py": "_all_token_ids _block_hasher all_token_ids block_hashes"
        " max_tokens num_prompt_tokens num_tokens prefill_stats prompt_token_ids request_id"
        " resumable sampling_params update_block_hashes",
    },
    "vllm.v1.metrics.stats:PrefillStats": {
        "own_prompts/scheduler.py": "num_local_cached_tokens num_prompt_tokens set"
    },
    "vllm.v1.engine:EngineCoreOutputs": {"own_prompts/scheduler.py": "outputs"},
    "vllm.v1.engine:EngineCoreOutput": {
        "own_prompts/scheduler.py": "finish_reason new_token_ids request_id"
    },
    "vllm.v1.engine:FinishReason": {"own_prompts/scheduler.py": "ERROR"},
    "vllm:LLM": {
        "llm.py": "llm_engine",
        "batch/generator.py": "enqueue enqueue_chat model_config request_counter",
    },
    "vllm.v1.engine.llm_engine:LLMEngine": {
        "llm.py": "engine_core output_processor vllm_config",
        "batch/generator.py": "abort_request step",
        "batch/file_job.py": "engine_core",
    },
    "vllm.v1.engine.core_client:EngineCoreClient": {"batch/file_job.py": "shutdown"},
    "vllm:RequestOutput": {
        "batch/generator.py": "finished outputs request_id",
        "batch/result.py": "kv_transfer_params prompt_logprobs prompt_token_ids",
        "remote_base/answers.py": "kv_transfer_params",
    },
    "vllm:CompletionOutput": {"batch/result.py": "finish_reason logprobs text token_ids"},
    "vllm.logprobs:Logprob": {"batch/result.py": "decoded_token logprob rank"},
    "vllm:SamplingParams": {
        "request.py": "extra_args",
        "own_prompts/prompts.py": "prompt_logprob_token_ids prompt_logprobs",
        "batch/request.py": "flat_logprobs output_kind output_text_buffer_length"
        " routed_experts_prompt_start skip_clone skip_reading_prefix_cache stream_interval",
        "cli/generate.py": "max_tokens seed temperature top_k top_p",
    },
    "vllm:EngineArgs": {
        "config.py": "additional_config data_parallel_size gpu_memory_utilization hf_overrides"
        " kv_cache_memory_bytes scheduler_cls speculative_config tensor_parallel_size worker_cls",
        "validate.py": "convert create_model_config enable_lora enable_prompt_embeds load_format"
        " max_model_len runner skip_tokenizer_init",
        "cli/generate.py": "add_cli_args from_cli_args",
        "cli/serve.py": "shutdown_timeout",
    },
    "vllm.entrypoints.launchers.cli_args:FrontendArgs": {
        "cli/serve.py": "middleware",
        "cli/arguments.py": "chat_template",
    },
    "vllm.entrypoints.cli.types:CLISubcommand": {"cli/main.py": "cmd name subparser_init validate"},
}

# vLLM callable -> our file -> "/n" for n positional arguments (the instance counts), and keywords.
CALLS: dict[str, dict[str, str]] = {
    "vllm.transformers_utils.config:try_get_generation_config": {
        "surface/member.py": "/1 code_revision config_format hf_token revision trust_remote_code"
    },
    "vllm.transformers_utils.repo_utils:get_hf_file_to_dict": {"surface/member.py": "/3"},
    "vllm:LLM._beam_search_step": {
        "llm.py": "/1 base_sampling_params beam_width eos_token_id ignore_eos instances_batch"
        " sort_beams_key structured_output_backend structured_output_bitmask structured_output_key"
    },
    "vllm.config:ModelConfig": {
        "member_configs.py": "/0 allow_deprecated_quantization config_format"
        " disable_sliding_window dtype enforce_eager hf_overrides hf_token language_model_only"
        " model seed skip_tokenizer_init tokenizer_mode trust_remote_code"
    },
    "vllm.config:VllmConfig.get_quantization_config": {"member_configs.py": "/2"},
    "vllm.model_executor.model_loader:get_model_loader": {"members.py": "/1"},
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights": {
        "members.py": "/3"
    },
    "vllm.model_executor.model_loader.utils:initialize_model": {
        "members.py": "/1 model_config prefix"
    },
    "vllm.model_executor.model_loader.weight_tying:maybe_retie_word_embeddings": {
        "members.py": "/2"
    },
    "vllm.v1.attention.backend:subclass_attention_backend": {"attention.py": "/3"},
    "vllm.v1.attention.backends.utils:resolve_kv_cache_layout": {"kv_layout.py": "/3"},
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": {"kv_layout.py": "/2"},
    "vllm.v1.core.kv_cache_utils:get_kv_cache_config_from_groups": {"kv_layout.py": "/3"},
    "vllm.v1.core.kv_cache_utils:get_max_concurrency_for_kv_cache_config": {
        "kv_layout.py": "/2",
        "gpu_worker.py": "/2",
    },
    "vllm.v1.kv_cache_interface:replace_as": {"kv_layout.py": "/2 block_size drop"},
    "vllm.transformers_utils.config:get_config": {"engine_config.py": "/5 token"},
    "vllm.compilation.backends:set_model_tag": {"members.py": "/1"},
    "vllm.model_executor.models.utils:maybe_prefix": {"model.py": "/2"},
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward": {
        "heads.py": "/3 skip_gather"
    },
    "vllm.distributed:tensor_model_parallel_all_gather": {"heads.py": "/1"},
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler": {"model_state.py": "/3"},
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:gather_draft_sampled": {
        "spec_decode/verification.py": "/6"
    },
    "vllm.v1.worker.gpu.structured_outputs:grammar_invalid_drafts": {"runner.py": "/3"},
    "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample": {
        "spec_decode/speculator.py": "/5 apply_temperature is_drafting use_fp64"
    },
    "vllm.v1.worker.gpu.dp_utils:dispatch_cg_and_sync_dp": {
        "spec_decode/speculator.py": "/3 dp_rank dp_size dp_sync_state need_eager"
        " uniform_token_count"
    },
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
    "._update_positions_dependent_metadata": {"spec_decode/v1_runner.py": "/6"},
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
    "._determine_batch_execution_and_padding": {"spec_decode/v1_runner.py": "/2"},
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
    ".build_per_group_and_layer_attn_metadata": {"spec_decode/v1_runner.py": "/3"},
    "vllm.v1.sample.thinking_budget_state:maybe_create_thinking_budget_state_holder": {
        "spec_decode/v1_runner.py": "/5"
    },
    "vllm.config.speculative:SpeculativeConfig.hf_config_override": {"validate.py": "/1"},
    "vllm.v1.worker.gpu.input_batch:get_num_sampled_and_rejected": {"sampler.py": "/5"},
    "vllm.v1.worker.gpu.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask": {
        "runner.py": "/5"
    },
    "vllm.utils.torch_utils:async_tensor_h2d": {
        "own_prompts/inputs.py": "/1 device dtype",
        "sampler.py": "/1 device",
    },
    "vllm.utils.torch_utils:current_stream": {"sampler_graphs.py": "/0"},
    "vllm.compilation.cudagraph_pool:capture_pool": {"sampler_graphs.py": "/2"},
    "vllm.distributed.parallel_state:graph_capture": {"runner.py": "/0 device"},
    "vllm.utils.gc_utils:freeze_gc_for_cudagraph_capture": {"runner.py": "/0"},
    "vllm.v1.outputs:LogprobsTensors": {"sampler.py": "/3"},
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings": {
        "own_prompts/inputs.py": "/4 num_tokens_padded out"
    },
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": {
        "own_prompts/scheduler.py": "/4"
    },
    "vllm.v1.core.kv_cache_utils:hash_block_tokens": {"own_prompts/scheduler.py": "/4"},
    "vllm.v1.metrics.stats:PrefillStats.set": {
        "own_prompts/scheduler.py": "/1 num_external_cached_tokens num_local_cached_tokens"
        " num_prompt_tokens"
    },
    "vllm.renderers.chat_utils:parse_chat_messages": {
        "own_prompts/member_prompts.py": "/2 content_format"
    },
    "vllm.renderers.chat_utils:has_non_text_content": {"own_prompts/member_prompts.py": "/1"},
    "vllm.renderers.hf:resolve_chat_template": {"eval/model.py": "/3 model_config"},
    "vllm.renderers.hf:safe_apply_chat_template": {
        "own_prompts/member_prompts.py": "/3 chat_template tokenize tools"
    },
    "vllm:LLM.enqueue": {"batch/generator.py": "/3 use_tqdm"},
    "vllm:LLM.enqueue_chat": {"batch/generator.py": "/3 use_tqdm"},
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request": {"batch/generator.py": "/2"},
    "vllm.tokenizers:cached_tokenizer_from_config": {"validate.py": "/1"},
    "vllm.benchmarks.latency:add_cli_args": {"cli/bench.py": "/1"},
    "vllm.benchmarks.latency:main": {"cli/bench.py": "/1"},
    "vllm.benchmarks.throughput:add_cli_args": {"cli/bench.py": "/1"},
    "vllm.benchmarks.throughput:main": {"cli/bench.py": "/1"},
    "vllm.benchmarks.serve:add_cli_args": {"cli/bench.py": "/1"},
    "vllm.benchmarks.serve:main": {"cli/bench.py": "/1"},
    "vllm.v1.worker.gpu.sample.gumbel:gumbel_noised_argmax": {
        "kernels/combine_sample_kernels.py": "/6 APPLY_TEMPERATURE IS_DRAFTING USE_FP64"
    },
    "vllm.v1.worker.gpu.sample.gumbel:murmur3_hash32": {"kernels/combine_sample_kernels.py": "/3"},
    "vllm.v1.worker.gpu.sample.gumbel:murmur3_uniform32": {"kernels/fused_head.py": "/3"},
    "vllm.v1.worker.gpu.sample.gumbel:_log1p_neg_stable": {"kernels/fused_head.py": "/1"},
}

# Our class -> vLLM's methods that it overrides. Each must still be there, and be called as ours is.
OVERRIDES: dict[str, str] = {
    "proxy_vllm.adapters.cpu_products:ProductsByAdapter": "__init__ add_lora_embedding"
    " add_lora_linear update_metadata",
    "proxy_vllm.adapters.manager:AdapterRunner": "_set_active_loras load_lora_model",
    "proxy_vllm.adapters.manager:ExpertAdapterWorker": "__init__ _load_adapter",
    "proxy_vllm.adapters.manager:ExpertAdapters": "_create_lora_modules _init_punica_wrapper",
    "proxy_vllm.cli.bench:BenchSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.bench:_Offline": "add_cli_args",
    "proxy_vllm.cli.bench:Latency": "cmd",
    "proxy_vllm.cli.bench:Throughput": "cmd",
    "proxy_vllm.cli.bench:Serve": "add_cli_args cmd",
    "proxy_vllm.cli.demo:DemoSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.doctor:DoctorSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.eval:EvalSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.explain:ExplainSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.generate:GenerateSubcommand": "cmd subparser_init",
    "proxy_vllm.cli.serve:ProxyServeSubcommand": "cmd subparser_init validate",
    "proxy_vllm.spec_decode.speculator:ExpertSpeculator": "__init__ capture init_cudagraph_manager"
    " load_draft_model load_model propose",
    "proxy_vllm.spec_decode.scheduler:DraftingScheduler": "__init__ _update_after_schedule"
    " make_spec_decoding_stats update_draft_token_ids update_from_output",
    "proxy_vllm.spec_decode.v1_runner:ExpertProposer": "__init__ load_model propose"
    " validate_same_kv_cache_group",
    "proxy_vllm.spec_decode.v1_runner:DraftVerifier": "__init__ forward",
    "proxy_vllm.explain.columns:ExplainedTensors": "filter to_cpu_nonblocking tolists",
    "proxy_vllm.explain.columns:ExplainedLists": "slice_request",
    "proxy_vllm.explain.front_end:ExplainingProcessor": "__init__ _update_sample_logprobs",
    "proxy_vllm.explain.front_end:ExplainingOutputProcessor": "__init__ add_request",
    "proxy_vllm.server.extra_fields:CarryingChat": "__init__ chat_completion_full_generator"
    " chat_completion_stream_generator",
    "proxy_vllm.server.extra_fields:CarryingCompletion": "__init__ completion_stream_generator"
    " request_output_to_completion_response",
    "proxy_vllm.worker.cpu_worker:ProxyCPUModelRunner": "__init__ _bookkeeping_sync"
    " _input_fits_in_drafter _model_forward _sample _update_states load_model"
    " may_reinitialize_input_batch sample_tokens warming_up_model",
    "proxy_vllm.worker.cpu_worker:ProxyCPUWorker": "_make_model_runner init_device",
    "proxy_vllm.llm:ProxyLLM": "__init__ _add_request _beam_search_step _preprocess_chat_one"
    " _preprocess_cmpl _preprocess_cmpl_one",
    "proxy_vllm.composite.engine_config:CompositeConfig": "verify_and_update_config"
    " verify_and_update_model_config",
    "proxy_vllm.composite.model:ProxyTunedForCausalLM": "__init__ forward"
    " make_empty_intermediate_tensors",
    "proxy_vllm.worker.model_state:_ProxyState": "__init__ add_request apply_staged_writes"
    " custom_sampler get_additional_cg_support initialize_kv_cache prepare_attn"
    " prepare_dummy_inputs prepare_inputs remove_request",
    "proxy_vllm.own_prompts.scheduler:ProxyScheduler": "__init__ _free_request add_request schedule"
    " update_from_output",
    "proxy_vllm.worker.model_runner:ProxyModelRunner": "__init__ _dummy_sampler_run capture_model"
    " gather_batch_req_state sample shutdown",
    "proxy_vllm.worker.sampler:ProxySampler": "__init__ add_request",
    "proxy_vllm.server.ray_serve:_Parser": "error",
    "proxy_vllm.remote_base.async_llm:RemoteBaseLLM": "_run_output_handler",
    "proxy_vllm.worker.gpu_worker:ProxyWorker": "_make_model_runner compile_or_warm_up_model"
    " execute_model get_kv_cache_spec init_device initialize_from_config load_model"
    " reload_weights",
}

# vLLM function -> calls in its body that reach our overrides, and keywords that they must pass.
HOOKS: dict[str, dict[str, str]] = {
    "vllm.lora.model_manager:LoRAModelManager.__init__": {
        "self._init_punica_wrapper": "",
        "self._create_lora_modules": "",
    },
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter": {"self._load_adapter": ""},
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model": {"self.load_lora_model": ""},
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion._create_completion": {
        "self.completion_stream_generator": "",
        "self.request_output_to_completion_response": "",
    },
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat._create_chat_completion": {
        "self.chat_completion_stream_generator": "",
        "self.chat_completion_full_generator": "",
    },
    "vllm.entrypoints.common.offline:OfflineInferenceMixin._preprocess_cmpl_one": {
        "self._preprocess_cmpl": ""
    },
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": {
        "self._preprocess_cmpl": ""
    },
    "vllm.config:VllmConfig.try_verify_and_update_config": {"cls.verify_and_update_config": ""},
    "vllm.v1.worker.gpu_worker:Worker._init_workspace_and_model_runner": {
        "self._make_model_runner": ""
    },
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": {
        "self._model_forward": "positions",
        "self._update_states": "",
        "self.model.compute_logits": "",
    },
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": {"logprobs.slice_request": ""},
    "vllm.v1.engine.async_llm:AsyncLLM._add_request": {"self.output_processor.add_request": ""},
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": {"self.output_processor.add_request": ""},
    "vllm.v1.engine.logprobs:LogprobsProcessor.update_from_output": {
        "self._update_sample_logprobs": ""
    },
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": {
        "self._sample": "",
        "self._bookkeeping_sync": "",
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model": {
        "self.model_state.custom_sampler": ""
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": {
        "self.gather_batch_req_state": "",
        "self._set_active_loras": "",
        "self.model_state.prepare_attn": "",
        "self.model_state.prepare_inputs": "",
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": {"self.sample": ""},
    # By its name the runner learns that batch-sharded sampling may be used.
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample": {
        "self.model.compute_logits_local": ""
    },
    "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory": {
        "runner.capture_model": "profile_only"
    },
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": {
        "self.model_runner.capture_model": ""
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests": {
        "self.model_state.add_request": "",
        "self.sampler.add_request": "",
        "self.model_state.apply_staged_writes": "",
    },
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._remove_request": {
        "self.model_state.remove_request": ""
    },
    "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request": {"processor.add_request": ""},
}

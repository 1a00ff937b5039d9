"""What is known of vLLM without importing it: the versions that are served, the key of the compilation config, the key of
`additional_config` that holds the options, and what its sampler calls."""

from __future__ import annotations

from packaging.version import Version

KEY = "custom_passes"
OPTIONS = "bi_compile"
OLDEST, NEWEST = Version("0.23"), Version("0.34")
"""The oldest version that is served, and the first that was not tried."""

RANDOM_SAMPLING = dict.fromkeys(
    [
        f"aten.{name}"
        for name in "exponential.default exponential_.default rand.default rand.generator rand_like.default randn.default randint.low "
        "randint.low_generator randint_like.low_dtype uniform_.default".split()
    ]
    + ["prims.inductor_random.default"],
    "vLLM draws random numbers for dummy requests and for sampling, where a request with a seed of its own draws the same in every batch "
    "(docs/use/vllm.md)",
)
"""Trusted in what vLLM runs beside the model's graph."""

PLACES = {
    "aten.repeat_interleave.Tensor": "vLLM's drafts have a request's numbers repeated for each of its tokens; it copies, and adds nothing up",
}
"""Trusted in what a worker runs uncompiled, where which dimension holds the rows is not followed."""

HOOKED: dict[str, tuple[str, ...]] = {
    "vllm.config.utils": ("config",),
    "vllm.config.compilation": ("CompilationConfig",),
    "vllm.config.vllm": ("VllmConfig.__post_init__",),
    "vllm.v1.worker.worker_base": (
        "WorkerWrapperBase.init_worker",
        "WorkerWrapperBase.init_device",
        "WorkerWrapperBase.execute_model",
        "WorkerWrapperBase.shutdown",
        "WorkerBase.load_model",
        "WorkerBase.compile_or_warm_up_model",
        "WorkerBase.sample_tokens",
    ),
}
"""Module of vLLM -> what is wrapped in it (`hooks`). tests/vllm/names_by_version.py looks for these names, and for those that the
other modules here use, in releases of vLLM."""
USED: dict[str, tuple[str, ...]] = {
    "vllm.envs": ("disable_envs_cache", "environment_variables"),
    "vllm.ir": ("set_default_torch_wrap",),
    "vllm.config.kernel": ("IrOpPriorityConfig.set_default",),
    "vllm.compilation.passes.inductor_pass": ("InductorPass.uuid",),
    "vllm.compilation.passes.vllm_inductor_pass": ("VllmInductorPass",),
    "vllm.compilation.wrapper": ("TorchCompileWithNoGuardsWrapper",),
    "vllm.model_executor.layers.utils": ("dispatch_cpu_unquantized_gemm",),
    "vllm.distributed.device_communicators.cpu_communicator": ("CpuCommunicator.all_reduce",),
    "vllm.model_executor.layers.rotary_embedding": ("_ROPE_DICT",),
    "vllm.model_executor.layers.activation": ("_ACTIVATION_REGISTRY", "_ACTIVATION_AND_MUL_REGISTRY"),
    "vllm.model_executor.layers.linear": ("RowParallelLinear", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding",),
    "vllm.model_executor.layers.attention_layer_base": ("AttentionLayerBase",),
    "vllm.v1.attention.backends.flash_attn": ("flash_attn_varlen_func", "get_scheduler_metadata"),
    "vllm.v1.attention.backends.triton_attn": ("unified_attention", "triton_reshape_and_cache_flash"),
    "vllm.config.attention": ("AttentionConfig.backend",),
    "vllm.config.compilation": ("CUDAGraphMode.mixed_mode",),
    "vllm.config.cache": ("CacheConfig.cache_dtype", "CacheConfig.user_specified_block_size"),
    "vllm.config.model": (
        "ModelConfig.dtype",
        "ModelConfig.hf_text_config",
        "ModelConfig.get_head_size",
        "ModelConfig.get_sliding_window",
        "ModelConfig.is_hybrid",
        "ModelConfig.use_mla",
    ),
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum.TRITON_ATTN",),
    "vllm.model_executor.layers.fused_moe.fused_moe": ("_prepare_expert_assignment", "invoke_fused_moe_triton_kernel"),
    "vllm.model_executor.layers.fused_moe.experts.triton_moe": ("try_get_optimal_moe_config", "TritonExperts.moe_sum"),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": ("MoERunner._forward_impl",),
    "vllm.v1.sample.ops.topk_topp_sampler": ("apply_top_k_top_p_pytorch",),
    "vllm.v1.worker.gpu_worker": ("Worker.determine_available_memory", "Worker.execute_dummy_batch"),
    "vllm.v1.core.sched.output": (
        "SchedulerOutput.scheduled_new_reqs",
        "SchedulerOutput.num_scheduled_tokens",
        "SchedulerOutput.total_num_scheduled_tokens",
        "SchedulerOutput.finished_req_ids",
        "NewRequestData.sampling_params",
        "NewRequestData.pooling_params",
        "NewRequestData.mm_features",
        "NewRequestData.prompt_embeds",
    ),
}
"""Module of vLLM -> what `bi_compile.vllm` uses of it."""

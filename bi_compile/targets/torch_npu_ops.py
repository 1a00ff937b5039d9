"""What is known of torch_npu's operators on Ascend, apart from those that the tables in `passes/` replace.

Each operator (`npu::packet`, `npu::packet.overload`) stands once, under the reason for its verdict; docs/reference/npu-operators.md is
made from these lists and the registry. Where "by meaning" is said, the operator's documented meaning is the source: what
torch_npu 2.13 documents for it lets no row see another, and no sum is taken. How an Ascend kernel ends a loop cannot make
a difference as on a CPU: its vector unit computes the tail with the same instruction under a mask (Ascend C
programming guide, "mask").
"""

from __future__ import annotations

from collections.abc import Mapping


def _named(reasons: Mapping[str, str]) -> dict[str, str]:
    return {f"npu::{name}": reason for reason, names in reasons.items() for name in names.split()}


#: row-local by meaning
ROW_LOCAL = _named({
    "pointwise": """_npu_dtype_cast npu_dtype_cast npu_dtype_cast_ fast_gelu npu_fast_gelu npu_gelu npu_gelu_mul npu_silu npu_silu_
        npu_mish npu_swiglu npu_clipped_swiglu npu_geglu one_ npu_masked_fill_range""",
    "each element is scaled and rounded by itself": "npu_quantize npu_anti_quant npu_anti_mx_quant npu_group_quant npu_trans_quant_param",
    "each row is rotated by its own angle": "npu_rotary_mul npu_apply_rotary_pos_emb npu_interleave_rope npu_mrope",
    "each element is scaled and activated by itself, and each row quantised by its own largest element": "npu_dequant_swiglu_quant",
    "a maximum or an order comes out the same in every order of work": "npu_max.dim npu_min.dim npu_sort_v2 npu_sort_v2.out",
    "makes or moves elements": """_npu_format_cast _npu_format_cast.aclnn _npu_format_cast.input_dtype npu_format_cast
        npu_format_cast.Tensor npu_format_cast_ npu_format_cast_.acl_format npu_transpose npu_transpose.out npu_reshape npu_reshape.out
        npu_slice npu_slice.out npu_pad npu_broadcast npu_broadcast.out npu_indexing npu_indexing.out npu_stride_copy npu_stride_copy.out
        npu_view_copy copy_memory_ npu_confusion_transpose npu_one_hot empty_with_format empty_with_swapped_memory
        unsafe_empty_with_format npu_change_data_ptr npu_convert_weight_to_int4pack npu_sign_bits_pack npu_sign_bits_unpack""",
    "writes rows to places that the caller gives, or reads them there": """npu_scatter npu_scatter_nd_update npu_scatter_nd_update_
        scatter_update scatter_update_ npu_scatter_pa_cache.value npu_scatter_pa_kv_cache npu_scatter_pa_kv_cache_functional
        npu_gather_pa_kv_cache npu_gather_pa_kv_cache_functional""",
    "sorts rows by expert and moves them; the caller moves them back": """npu_moe_init_routing npu_moe_init_routing_v2
        npu_moe_token_permute npu_moe_token_permute_with_routing_map npu_moe_compute_expert_tokens npu_moe_re_routing""",
    "infers a shape or hands out a workspace": """_npu_fused_infer_attention_score_get_max_workspace
        _npu_fused_infer_attention_score_infer_output _npu_fused_infer_attention_score_v2_get_max_workspace
        _npu_fused_infer_attention_score_v2_infer_output _npu_fusion_attention_v3_get_max_workspace _npu_fusion_attention_v3_infer_output
        _npu_fusion_attention_grad_v3_get_max_workspace _npu_fusion_attention_grad_v3_infer_output get_npu_format get_storage_size""",
    "a mark, a setting or a print; computes nothing": """npu_prefetch super_kernel_scope_begin super_kernel_scope_end set_op_timeout_ms
        print_npugraph_tensor save_npugraph_tensor save_npugraph_tensor.tensor_list npu_alloc_float_status npu_clear_float_status
        npu_get_float_status _npu_distribute_barrier""",
})  # fmt: skip

#: native kernels that others found to be invariant
TRUSTED = _named({
    "AclnnRmsNorm gives a row the same bits in every batch: it is what vllm-ascend's batch-invariant mode puts in place of "
    "AclnnAddRmsNorm (vllm-ascend PR 6910, batch_invariant.py, add_rms_norm)": "npu_rms_norm",
})  # fmt: skip

#: nothing is known, and what would be needed to change that
UNPROVEN = _named({
    "a gradient: only the forward graph is rewritten": """_conv_depthwise2d_backward _dropout_with_byte_mask_backward _gru_npu_backward
        _lstm_npu_backward _npu_dtype_cast_backward _npu_rms_norm_backward_quant _npu_swiglu_backward_mx_quant_with_dual_axis
        fft_c2r_backward fft_r2c_backward kl_div_backward kl_div_target_backward l1_loss_backward matmul_double_backward
        npu_add_layer_norm_backward npu_attn_softmax_backward_ npu_binary_cross_entropy_with_logits_backward
        npu_block_sparse_attention_backward npu_bmm_v2_mat1_backward npu_bmm_v2_mat2_backward npu_ciou_backward
        npu_confusion_transpose_backward npu_conv2d_backward npu_conv3d_backward npu_conv_transpose2d_backward
        npu_conv_transpose3d_backward npu_convolution_backward npu_convolution_transpose_backward npu_cross_entropy_loss_backward
        npu_deep_norm_backward npu_deformable_conv2dbk npu_diou_backward npu_dropout_backward npu_dropout_with_add_softmax_backward
        npu_dtype_cast_backward npu_fast_gelu_backward npu_fused_attention_qkv_grad npu_fused_attention_score_backward
        npu_fused_attention_score_grad npu_fused_floyd_attention_backward npu_fused_linear_cross_entropy_loss_with_max_sum_backward
        npu_fusion_attention_grad npu_fusion_attention_grad_v2 npu_fusion_attention_grad_v3 npu_fusion_attention_grad_v3.out
        npu_gather_backward npu_gather_sparse_index_backward npu_geglu_grad npu_gelu_backward npu_giou_backward
        npu_group_norm_swish_grad npu_gru_backward npu_layernorm_grad npu_lightning_indexer_grad npu_linear_backward npu_lstm_backward
        npu_lstm_cell_backward npu_lstm_data_backward npu_masked_causal_conv1d_backward npu_max_backward npu_mhc_post_backward
        npu_mhc_pre_backward npu_mhc_sinkhorn_backward npu_min_backward npu_mish_backward npu_moe_gating_top_k_backward
        npu_moe_token_permute_grad npu_moe_token_permute_grad_v2 npu_moe_token_permute_with_routing_map_grad npu_moe_token_unpermute_grad
        npu_moe_token_unpermute_grad_v2 npu_moe_token_unpermute_with_routing_map_grad npu_multi_head_attention_backward
        npu_nsa_compress_grad npu_nsa_select_attention_grad npu_ps_roi_pooling_backward npu_quant_fusion_attention_backward
        npu_renorm_backward npu_rms_norm_backward npu_roi_alignbk npu_rotary_mul_backward npu_scaled_masked_softmax_backward
        npu_silu_backward npu_softmax_cross_entropy_with_logits_backward npu_sparse_flash_attention_grad
        npu_sparse_lightning_indexer_grad_kl_loss npu_dense_lightning_indexer_grad_kl_loss npu_swiglu_backward
        npu_swiglu_group_quant_backward repeat_interleave_backward_int repeat_interleave_backward_tensor slow_conv_dilated2d_backward
        slow_conv_transpose2d_backward stft_backward""",
    "a training step, a loss or an optimiser; needs nothing for inference": """_amp_foreach_non_finite_check npu_apply_adam
        npu_apply_adam.out npu_apply_adam_w npu_apply_adam_w.out npu_bert_apply_adam npu_bert_apply_adam.out npu_cross_entropy_loss
        npu_softmax_cross_entropy_with_logits npu_fused_cross_entropy_loss_with_max_sum npu_fused_linear_online_max_sum _npu_silent_check
        _npu_silent_check_v2 _npu_silent_check_v3 batch_norm_gather_stats_update batch_norm_reduce npu_normalize_batch npu_ifmr""",
    "draws random numbers, which follow a row's place in the batch": """_dropout_with_byte_mask _npu_dropout _npu_dropout_gen_mask.Tensor
        dropout_with_byte_mask npu_dropout_do_mask npu_dropout_gen_mask npu_dropout_with_add_softmax npu_random_choice_with_mask
        npu_sim_exponential_ npu_sub_sample npu_top_k_top_p_sample""",
    "detects boxes in images: combines boxes, needs a definition of its rows": """_npu_ciou npu_anchor_response_flags npu_batch_nms
        npu_bounding_box_decode npu_bounding_box_encode npu_ciou npu_diou npu_giou npu_grid_assign_positive npu_iou npu_nms_rotated
        npu_nms_v4 npu_nms_with_mask npu_ps_roi_pooling npu_ptiou npu_roi_align npu_rotated_box_decode npu_rotated_box_encode
        npu_rotated_iou npu_rotated_overlaps npu_yolo_boxes_encode""",
    "a convolution: needs an invariant convolution": """npu_conv2d npu_conv2d.out npu_conv3d npu_conv3d.out npu_conv_transpose2d
        npu_convolution npu_convolution_transpose npu_deformable_conv2d npu_quant_conv2d npu_fused_causal_conv1d
        npu_fused_causal_conv1d_v2 npu_masked_causal_conv1d""",
    "a recurrent network: needs invariant products inside": """_gru_npu _lstm_npu npu_gru npu_lstm npu_lstm_cell npu_lstm_data
        npu_chunk_gated_delta_rule npu_recurrent_gated_delta_rule npu_recurrent_gated_delta_rule_functional""",
    "attention without an invariant kernel here: needs one with this operator's arguments, or the form "
    "npu_fused_infer_attention_score, which is replaced": """npu_attention_update npu_block_sparse_attention
        npu_fused_attention_layernorm_qkv_fwd npu_fused_attention_score npu_fused_attention_score_fwd npu_fused_floyd_attention
        npu_fusion_attention_v2
        npu_fusion_attention_v3.out npu_incre_flash_attention npu_kv_quant_sparse_flash_attention
        npu_lightning_indexer npu_dense_lightning_indexer_softmax_lse npu_multi_head_attention npu_nsa_compress npu_nsa_compress_attention
        npu_nsa_compress_attention_infer npu_nsa_compress_infer.cache npu_nsa_select_attention npu_nsa_select_attention_infer
        npu_prompt_flash_attention npu_quant_fusion_attention npu_quant_lightning_indexer npu_ring_attention_update
        npu_sparse_flash_attention npu_mla_prolog npu_mla_prolog_v2 npu_mla_prolog_v3 npu_mla_prolog_v3_functional""",
    "a product without an invariant kernel here: needs one of its kind (quantised, grouped or fused), or the model in plain "
    "bfloat16 or float16": """_npu_matmul_abft_verify npu_add_quant_gmm npu_add_quant_gmm_ npu_add_quant_matmul npu_add_quant_matmul_
        npu_batch_gather_matmul npu_batch_gather_matmul_ npu_dual_level_quant_matmul npu_ffn npu_fused_matmul npu_grouped_matmul.List
        npu_grouped_matmul_add npu_grouped_matmul_add_ npu_grouped_matmul_finalize_routing
        npu_grouped_matmul_swiglu_quant_v2 npu_kronecker_quant npu_matmul_compress_dequant npu_quant_grouped_matmul_dequant
        npu_quant_matmul_dequant npu_quant_matmul_gelu npu_quant_matmul_reduce_sum npu_rotate_quant
        npu_transpose_quant_batchmatmul npu_weight_quant_batchmatmul npu_weight_quant_preprocess npu_mhc_pre npu_mhc_post
        npu_mhc_sinkhorn obfuscation_calculate obfuscation_finalize obfuscation_initialize""",
    "a product fused with communication: needs product and collective apart (switch the fusion off)": """npu_all_gather_base_mm
        npu_all_gather_quant_mm npu_all_to_all_matmul npu_all_to_all_quant_matmul npu_alltoallv_gmm npu_alltoallv_quant_gmm
        npu_gmm_alltoallv npu_matmul_all_to_all npu_mm_reduce_scatter_base npu_quant_gmm_alltoallv npu_quant_matmul_all_to_all
        npu_quant_mm_reduce_scatter""",
    "moves tokens between ranks and adds up experts' parts in an order that the kernel chooses: needs the sum over experts "
    "taken apart (all-gather dispatch)": """npu_moe_distribute_combine npu_moe_distribute_combine_add_rms_norm
        npu_moe_distribute_combine_v2 npu_moe_distribute_dispatch npu_moe_distribute_dispatch_v2 npu_attention_to_ffn
        npu_attention_worker_combine npu_ffn_to_attention npu_ffn_worker_batching attention_worker_scheduler attention_worker_scheduler_
        ffn_worker_scheduler ffn_worker_scheduler_""",
    "mixture of experts without an invariant form here: needs its documented meaning written with invariant operators": """
        _npu_moe_token_unpermute _npu_moe_token_unpermute_with_routing_map npu_moe_finalize_routing
        npu_moe_gating_top_k_softmax_v2 npu_moe_init_routing_quant npu_moe_token_unpermute_with_routing_map npu_moe_update_expert""",
    "a row sum in a fused kernel: needs the norm or softmax apart, which is replaced": """npu_add_rms_norm_dynamic_mx_quant
        npu_add_rms_norm_v2 npu_add_rms_norm_v2_functional npu_attn_softmax_ npu_deep_norm npu_group_norm_swish npu_kv_rmsnorm_rope_cache_v2
        npu_kv_rmsnorm_rope_cache_v2_functional npu_masked_softmax_with_rel_pos_bias npu_qkv_rms_norm_rope_cache
        npu_qkv_rms_norm_rope_cache_functional npu_rms_norm_dynamic_mx_quant npu_rms_norm_quant npu_rms_norm_quant_v2
        npu_scaled_masked_softmax npu_top_k_top_p""",
    "quantises in blocks that may hold several rows, or by a scale of the whole tensor: needs per-token quantisation": """
        _quantize_per_channel_impl.out _quantize_per_tensor_impl.out npu_dequant_bias npu_dequant_rope_quant_kvcache
        npu_dynamic_block_mx_quant npu_dynamic_block_quant npu_dynamic_dual_level_mx_quant npu_dynamic_mx_quant
        npu_dynamic_mx_quant_with_dual_axis npu_gelu_quant npu_grouped_dynamic_block_quant npu_grouped_dynamic_mx_quant npu_quant_max
        npu_quant_scatter npu_quant_scatter_ npu_rope_quant_kvcache npu_swiglu_group_quant npu_swiglu_mx_quant
        npu_swiglu_mx_quant_with_dual_axis npu_swiglu_quant""",
    "adds up where indices meet, or updates several rows at once: needs an order": """_npu_index_add _npu_index_add_ npu_scatter_list
        npu_scatter_list_ npu_gather_sparse_index npu_advance_step_flashattn npu_stride_add""",
    "a codec; needs a definition of its rows": "npu_hans_decode.out npu_hans_encode.out",
})  # fmt: skip

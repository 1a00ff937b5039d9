"""Operators that are known to vary and that no pass replaces, and why: the eager fallback and its audit refuse them by name."""

from __future__ import annotations


def _all(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


#: operators (`ns::packet`) that vary and that no pass replaces -> why; integers come out the same in every order
REFUSED: dict[str, str] = {
    f"{'' if '::' in name else 'aten::'}{name}": why
    for name, why in {
        **_all(
            "convolution conv_tbc _slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d "
            "slow_conv_transpose2d slow_conv_transpose3d _nnpack_spatial_convolution",
            "the library chooses its algorithm by the size of the batch: write it as unfold and a product, or compile it where a pass of "
            "yours replaces it",
        ),
        **_all(
            "mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell _cudnn_rnn miopen_rnn quantized_lstm quantized_gru",
            "its products follow the number of rows: call the cell step by step, as linear, sigmoid and tanh",
        ),
        **_all(
            "_linalg_det _linalg_slogdet _linalg_solve_ex _linalg_eigh _linalg_eigvals linalg_eigvals _linalg_svd linalg_cholesky_ex "
            "linalg_eig linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu "
            "linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_pinv linalg_qr linalg_solve_triangular cholesky "
            "cholesky_inverse cholesky_solve _cholesky_solve_helper geqrf ormqr triangular_solve",
            "LAPACK divides its sums among the threads at hand",
        ),
        **_all("_fft_c2c _fft_c2r _fft_r2c", "the library chooses its plan by the number of transforms and of threads"),
        **_all(
            "addbmm vdot trace prod cumprod logcumsumexp renorm dist _cdist_forward _pdist_forward _euclidean_dist _trilinear "
            "_embedding_bag _embedding_bag_forward_only segment_reduce mkldnn_linear _weight_int8pack_mm _weight_int4pack_mm_for_cpu",
            "the order of its sum follows the number of elements and of threads",
        ),
        **_all(
            "quantized::linear_dynamic quantized::linear_relu_dynamic quantized::conv1d_dynamic quantized::conv2d_dynamic "
            "quantized::conv3d_dynamic quantized::quantized_lstm_cell_dynamic quantized::quantized_gru_cell_dynamic "
            "quantized::quantized_rnn_relu_cell_dynamic quantized::quantized_rnn_tanh_cell_dynamic quantize_per_tensor_dynamic "
            "_choose_qparams_per_tensor choose_qparams_optimized",
            "the scale of a row follows the largest number of the whole batch: quantize each row with a scale of its own",
        ),
        **_all(
            "quantized::linear_dynamic_fp16 quantized::linear_relu_dynamic_fp16 quantized::linear_dynamic_fp16_unpacked_weight",
            "nothing is known of the order of its sum: use a linear layer in float16",
        ),
        **_all(
            "index_add scatter_add scatter_reduce index_reduce put _index_put_impl_",
            "it adds up where indices meet, in an order that nothing fixes",
        ),
        **_all(
            "c10d::allreduce_ c10d::allreduce_coalesced_ c10d::reduce_ c10d::reduce_scatter_ c10d::_reduce_scatter_base_ "
            "c10d::reduce_scatter_tensor_coalesced_",
            "which rank adds up what, and in which order, follows the size: call torch.distributed._functional_collectives, whose "
            "operators are replaced",
        ),
    }.items()
}

#: the same of sparse tensors, whose operators have kernels of their own (`SPARSE_KEYS`) beside those that are replaced
REFUSED_SPARSE = _all(
    " ".join(
        f"aten::{name}"
        for name in "mm addmm addmv bmm baddbmm sum softmax _softmax _log_softmax _sparse_softmax _sparse_log_softmax "
        "_sparse_mm_reduce_impl sparse_sampled_addmm _sparse_addmm _sparse_sparse_matmul".split()
    ),
    "the library divides the sum of a sparse tensor among threads by its shape: call to_dense() first",
)
SPARSE_KEYS = {"cpu": ("SparseCPU", "SparseCsrCPU"), "cuda": ("SparseCUDA", "SparseCsrCUDA")}

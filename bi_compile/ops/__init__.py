"""`torch.ops.bi_compile.*`: invariant operators.

Each is opaque to the compilers above it, mutates nothing (but for `latent_key`, which fills the cache that it is given), and
gives the same bits through every way in: compiled, eager, inside a CUDA graph. The order of each sum is a function of the reduced
length, the dtype and the device.
"""

from .attention import paged_attention, scaled_dot_product_attention, sequence_attention, sequence_attention_backward
from .collective import REDUCE_OPS, all_reduce, all_reduce_tree, ranks, reduce_scatter
from .declare import BATCH, KERNELS, NAMESPACE, OPERATORS, load_kernels
from .latent import latent_key
from .matmul import addmm, baddbmm, bmm, bmm_transposed, grouped_mm, in_pairs, mm, mm_segments
from .moe import moe_combine, moe_experts, moe_gate
from .norm import add_rms_norm, group_norm, layer_norm, qk_norm, rms_norm
from .order import amax, amin, topk
from .pointwise import pointwise, tanh
from .reduce import cumsum, log_softmax, logsumexp, mean, softmax, sum, var_mean
from .write import index_copy, index_put, scatter

__all__ = [
    "BATCH",
    "KERNELS",
    "NAMESPACE",
    "OPERATORS",
    "REDUCE_OPS",
    "add_rms_norm",
    "addmm",
    "all_reduce",
    "all_reduce_tree",
    "amax",
    "amin",
    "baddbmm",
    "bmm",
    "bmm_transposed",
    "cumsum",
    "group_norm",
    "grouped_mm",
    "in_pairs",
    "index_copy",
    "index_put",
    "latent_key",
    "layer_norm",
    "load_kernels",
    "log_softmax",
    "logsumexp",
    "mean",
    "mm",
    "mm_segments",
    "moe_combine",
    "moe_experts",
    "moe_gate",
    "paged_attention",
    "pointwise",
    "qk_norm",
    "ranks",
    "reduce_scatter",
    "rms_norm",
    "scaled_dot_product_attention",
    "scatter",
    "sequence_attention",
    "sequence_attention_backward",
    "softmax",
    "sum",
    "tanh",
    "topk",
    "var_mean",
]  # fmt: skip

"""The passes, in the order in which they run. Each file is a table: operator, replacement, why, source.

add_rms_norm      residual add and RMS normalisation in one operator
rms_norm          RMS normalisation, whole or taken apart
layer_norm        layer and group normalisation
softmax           softmax and log_softmax, whole or taken apart
reductions        sum, mean, var, std, norms, logsumexp, cumsum
attention         scaled dot product attention
matmul_allreduce  products fused with a collective, and the collectives that add up
matmul            products
convolution       convolutions, average pools
recurrent         LSTMs
npu_attention     Ascend's attention operator
npu_mla           Ascend's fused operators of latent attention
cpu_attention     vLLM's attention on a CPU
cpu_moe           vLLM's experts on a CPU
npu_moe           Ascend's operators for mixtures of experts and for quantised models
ties              sorts, selections and maxima where elements are equal
writes            writes at indices, where several go to one place
pointwise         functions that a CPU computes differently by an element's place in memory
"""

from .add_rms_norm import AddRmsNorm
from .attention import Attention
from .convolution import Convolution
from .cpu_attention import CpuAttention
from .cpu_moe import CpuMoe
from .layer_norm import LayerNorm
from .matmul import Matmul
from .matmul_allreduce import InOneTree, MatmulAllreduce
from .npu_attention import NpuAttention
from .npu_mla import NpuMla
from .npu_moe import NpuMoe
from .pointwise import Pointwise
from .recurrent import Recurrent
from .reductions import Reductions
from .rms_norm import RmsNorm
from .softmax import Softmax
from .ties import Ties
from .writes import Writes

PASSES = (
    AddRmsNorm, RmsNorm, LayerNorm, Softmax, Reductions, Attention, MatmulAllreduce, Matmul, Convolution, Recurrent,
    NpuAttention, NpuMla, NpuMoe, CpuAttention, CpuMoe, Ties, Writes, Pointwise,
)  # fmt: skip

__all__ = ["PASSES", "InOneTree", *(p.__name__ for p in PASSES)]

"""A TEST BENCH, no part of the product: an NPU whose memory is the host's and whose native operators the CPU computes.

The stand-ins for CANN give torch_npu a device of host memory. Every aten operator that torch_npu registers is computed
there by PyTorch's CPU operator; the npu:: and atb:: operators that a dense model calls are written out after torch_npu's
documentation. So the real vllm-ascend serves a model on a machine without an NPU. bi_compile's own operators are not
emulated: their Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1).

With `perturb=True` every native operator with a sum that bi_compile's target does not trust really varies with the batch:
products, sums, softmax, the fused add and norm, attention. Not emulated: the chip's own order of sums, streams, ACL graphs
(a graph runs as it is), speed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import emulated_deepseek
import emulated_graph
import torch
from emulated_graph import LAUNCHES
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: allocation and metadata stay torch_npu's own, as views do
OWN = {
    "empty.memory_format", "empty_strided", "_reshape_alias", "_local_scalar_dense", "copy_", "_copy_from",
    "_copy_from_and_resize", "set_", "set_.source_Tensor", "set_.source_Storage", "set_.source_Storage_storage_offset",
    "resize_", "record_stream", "is_pinned", "_pin_memory", "_to_copy", "contiguous",
}  # fmt: skip
_libraries: list[torch.library.Library] = []


def library(namespace: str, kind: str = "IMPL") -> torch.library.Library:
    _libraries.append(torch.library.Library(namespace, kind))
    return _libraries[-1]


def host(t: Tensor) -> Tensor:
    """The NPU tensor's memory as a tensor of the CPU, not copied."""
    storage = t.untyped_storage()
    whole = storage.nbytes() // t.element_size() * t.element_size()
    if whole == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    raw = (ctypes.c_char * whole).from_address(storage.data_ptr())
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(t.dtype)
    return flat.as_strided(t.size(), t.stride(), t.storage_offset())


def device(t: Tensor) -> Tensor:
    """A copy of the CPU tensor on the NPU, with its strides."""
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="npu:0")
    if t.numel():
        host(out).copy_(t)
    return out


def on_host(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The CPU's `function` for tensors of the NPU; what it returns of its arguments is the NPU's own tensor again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        LAUNCHES[name] += 1
        given: list[tuple[Tensor, Tensor]] = []

        def down(x: Any) -> Any:
            if isinstance(x, Tensor) and x.device.type == "npu":
                given.append((x, host(x)))
                return given[-1][1]
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "npu" else x

        def up(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return next((npu for npu, cpu in given if cpu is x), None) if _is_given(x, given) else device(x)

        kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
        args, kwargs = tree_map(down, args), tree_map(down, kwargs)
        if emulated_graph.updating(name, args, kwargs):
            return tree_map(up, kwargs["out"])
        found = function(*args, **kwargs)
        result = tree_map(up, found)
        if emulated_graph.capturing():
            written = [host(x) if isinstance(x, Tensor) else None for x in tree_leaves(result)]
            emulated_graph.note(emulated_graph.Native(name, function, args, kwargs, written, (given, result)))
        return result

    return run


def _is_given(x: Tensor, given: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return any(cpu is x for _, cpu in given)


# -- native operators, on the CPU's tensors -----------------------------------------------------------------------------


def parts_of(count: int) -> int:
    """In how many parts a perturbed operator takes its sums for so many rows."""
    return 1 + count % 5


class Native:
    """The operators, each sum in `parts(rows)` parts."""

    def __init__(self, perturb: bool) -> None:
        self.parts = parts_of if perturb else lambda rows: 1

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        rows, length = a.shape[-2] if a.dim() > 1 else 1, a.shape[-1]
        cuts = [length * i // self.parts(rows) for i in range(self.parts(rows) + 1)]
        if not a.is_floating_point():
            return torch.matmul(a, b)
        blocks = [torch.matmul(a[..., i:j].float(), b[..., i:j, :].float()) for i, j in itertools.pairwise(cuts)]
        return _add_up(blocks).to(a.dtype)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """torch_npu's own kernel, which linear without a bias arrives at too."""
        if b.dim() == 1:
            return self.mm(a, b[:, None]).squeeze(-1)
        return (
            self.mm(a.flatten(0, -2), b).unflatten(0, a.shape[:-1]) if a.dim() > 2 and b.dim() == 2 else self.mm(a, b)
        )

    def addmm(self, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return beta * c + alpha * self.mm(a, b)

    def sum(self, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        if dim is None or not x.is_floating_point() or len(dim) != 1 or x.dim() < 2:
            return torch.sum(x, dim, keepdim, dtype=dtype) if dim is not None else torch.sum(x, dtype=dtype)
        rows = x.numel() // max(x.shape[dim[0]], 1)
        parts = [p.sum(dim[0], keepdim, dtype=torch.float32) for p in x.tensor_split(self.parts(rows), dim[0])]
        return _add_up(parts).to(dtype or x.dtype)

    def softmax(self, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
        e = torch.exp(x.float() - x.float().amax(dim, keepdim=True))
        return (e / self.sum(e, [dim], True)).to(torch.float32 if half_to_float else x.dtype)

    def log_softmax(self, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
        shifted = x.float() - x.float().amax(dim, keepdim=True)
        total = self.sum(torch.exp(shifted), [dim], True).log()
        return (shifted - total).to(torch.float32 if half_to_float else x.dtype)

    def add_rms_norm(self, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, ...]:
        """(x1 + x2) / rms * gamma, 1 / rms, x1 + x2."""
        s = x1 + x2
        square = self.sum(s.float().square().reshape(-1, s.shape[-1]), [1], True) / s.shape[-1]
        scale = torch.rsqrt(square + epsilon).view(*s.shape[:-1], 1)
        return (s.float() * scale * gamma.float()).to(s.dtype), scale, s

    def grouped_matmul(
        self, x: Sequence[Tensor], weight: Sequence[Tensor], *, group_list: Tensor, group_list_type: int = 0, **_: Any
    ) -> list[Tensor]:
        """One tensor of rows; the number of each expert's rows (type 1), or their ends."""
        ends = group_list.cumsum(0) if group_list_type else group_list
        out = x[0].new_zeros(x[0].shape[0], weight[0].shape[2])
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            out[start:end] = self.mm(x[0][start:end], weight[0][expert])
        return [out]

    def gate(
        self, x: Tensor, k: int, k_group: int, group_count: int, group_select_mode: int, renorm: int, norm_type: int,
        out_flag: bool, routed_scaling_factor: float, eps: float, bias_opt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """_C_ascend.moe_gating_top_k: weights, experts, scores (csrc/moe/moe_gating_top_k of vllm-ascend 0.23)."""
        scores = torch.sigmoid(x.float()) if norm_type else self.softmax(x.float(), -1)
        chosen_by = scores if bias_opt is None else scores + bias_opt.float()
        if group_count > 1:
            groups = chosen_by.unflatten(-1, (group_count, -1))
            best = groups.topk(2, -1).values.sum(-1) if group_select_mode else groups.amax(-1)
            left = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(k_group, -1).indices, True)
            chosen_by = groups.masked_fill(~left[..., None], -torch.inf).flatten(-2)
        experts = chosen_by.topk(k, -1).indices
        y = scores.gather(-1, experts)
        y = y / (self.sum(y, [-1], True) + eps) if renorm or norm_type else y
        return (y * routed_scaling_factor).to(x.dtype), experts.int(), scores

    def unpermute(self, tokens: Tensor, sorted_indices: Tensor, probs: Tensor, *_: Any) -> Tensor:
        """npu_moe_token_unpermute: a token's experts, weighted, added up."""
        parts = tokens[sorted_indices.long()].view(*probs.shape, -1).float() * probs.float()[..., None]
        first = self.parts(probs.shape[0]) % 2  # in the order of the gate, or the other way round
        return _add_up((parts if first else parts.flip(1)).unbind(1)).to(tokens.dtype)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, actual_seq_lengths: Sequence[int],
        actual_seq_lengths_kv: Sequence[int], block_table: Tensor | None = None, num_heads: int = 1, scale: float = 1.0,
        num_key_value_heads: int = 0, sparse_mode: int = 0, block_size: int = 0, query_rope: Tensor | None = None,
        key_rope: Tensor | None = None, softmax_lse_flag: bool = False, input_layout: str = "TND", **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """npu_fused_infer_attention_score in the layout TND: ends of the queries, lengths (paged) or ends of the keys."""
        heads, kv_heads = num_heads, num_key_value_heads or num_heads
        if query_rope is not None and key_rope is not None:
            split = lambda c: c.unflatten(-1, (kv_heads, -1)) if c.dim() == 3 and block_table is not None else c
            query, key = torch.cat([query, query_rope], -1), torch.cat([split(key), split(key_rope)], -1)
        query = query.reshape(query.shape[0], heads, query[:1].numel() // heads if len(query) else query.shape[-1])
        width = value.shape[-1] if value.dim() == 4 or block_table is None else value.shape[-1] // kv_heads
        out = query.new_zeros(query.shape[0], heads, width)
        lse = torch.full((query.shape[0], heads, 1), torch.inf)
        start = kv_start = 0
        for i, end in enumerate(actual_seq_lengths):
            if block_table is None:
                count = actual_seq_lengths_kv[i] - kv_start
                k, v = (c[kv_start : kv_start + count] for c in (key, value))
                kv_start += count
            else:
                count = actual_seq_lengths_kv[i]
                blocks = block_table[i][: -(-count // block_size)].long()
                k, v = (
                    c[blocks].flatten(0, 1).reshape(-1, kv_heads, c[0, 0].numel() // kv_heads)[:count]
                    for c in (key, value)
                )
            length, first = end - start, start
            start = end
            if length <= 0 or count <= 0:
                continue
            q = query[first:end].transpose(0, 1).float()
            k, v = (c.repeat_interleave(heads // kv_heads, 1).transpose(0, 1).float() for c in (k, v))
            scores = q @ k.transpose(1, 2) * scale
            if sparse_mode in (3, 4):
                behind = torch.arange(count)[None] > torch.arange(count - length, count)[:, None]
                scores = scores.masked_fill(behind, float("-inf"))
            weights, cuts = scores.softmax(-1), self.parts(query.shape[0])
            parts = zip(weights.tensor_split(cuts, 2), v.tensor_split(cuts, 1), strict=True)
            y = _add_up([w @ part for w, part in parts])
            out[first:end] = y.transpose(0, 1).to(out.dtype)
            lse[first:end, :, 0] = scores.logsumexp(-1).t()
        return out, lse if softmax_lse_flag else torch.zeros(1)


def _add_up(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * scale * gamma.float()).to(x.dtype), scale


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def rotate(positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool) -> None:
    cos, sin = cos_sin_cache[positions.long()].float()[:, None].chunk(2, -1)
    width = 2 * cos.shape[-1]
    for t in (query, key):
        x = t.float().reshape(t.shape[0], -1, head_size)
        a, b = x[..., :width].chunk(2, -1) if is_neox else (x[..., 0:width:2], x[..., 1:width:2])
        pair = [a * cos - b * sin, b * cos + a * sin]
        rotated = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
        t.copy_(torch.cat([rotated, x[..., width:]], -1).reshape(t.shape))


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    slots = slot_indices.long()
    for rows, cache in ((key, key_cache), (value, value_cache)):
        flat = cache.view(-1, *cache.shape[2:])
        flat[slots[slots >= 0]] = rows[: slots.numel()][slots >= 0].view(-1, *cache.shape[2:])


def init_routing(
    x: Tensor, expert_idx: Tensor, *, expert_num: int, active_expert_range: Sequence[int], quant_mode: int = 0, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_C_ascend.npu_moe_init_routing_custom: rows by expert (quant_mode 1: in int8), where each went, how many each expert has, scales."""
    experts = expert_idx.flatten().long()
    if emulated_graph.capturing():  # a Triton kernel before it has not run: numbers as memory has them
        experts = experts.remainder(expert_num)
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=expert_num)
    rows, scales = x[order // expert_idx.shape[1]], torch.empty(0)
    if quant_mode == 1:
        rows, scales = emulated_deepseek.dynamic_quant(rows)
    return rows, order.argsort().int(), counts, scales


def paged_cache_load(
    key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, *, seq_starts: Tensor, key: Tensor,
    value: Tensor, cumsum: bool = False,
) -> None:  # fmt: skip
    """Of each request, the context_lens rows from seq_starts on, one request after the other."""
    page, at = key_cache.shape[1], 0
    for table, start, count in zip(block_table.long(), seq_starts.tolist(), context_lens.tolist(), strict=False):
        n = torch.arange(start, start + count)
        for rows, cache in ((key, key_cache), (value, value_cache)):
            rows[at : at + count] = cache[table[n // page], n % page].view(count, *rows.shape[1:])
        at += count


def matmul_add(x: Tensor, weight: Tensor, c: Tensor) -> None:
    """c += x.t() @ weight: vllm-ascend calls it once, to warm ATB up."""
    c.add_(x.float().t() @ weight.float())


# -- installation -------------------------------------------------------------------------------------------------------


def install(perturb: bool = False) -> None:
    """Give the device its operators. Before vLLM is imported."""
    import torch_npu  # noqa: F401

    native, aten = Native(perturb), library("aten")
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
            packet, _, overload = full[6:].partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None and not op.is_view and full[6:] not in OWN:
                aten.impl(full[6:], on_host(op, full), "PrivateUse1", allow_override=True)

    def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        def again() -> None:
            LAUNCHES["aten::copy_"] += 1
            host(to).copy_(host(source))

        LAUNCHES["aten::copy_"] += 1
        if emulated_graph.capturing():
            if to.device != source.device:
                raise RuntimeError(f"a copy from {source.device} to {to.device} cannot be captured in an ACL graph")
            emulated_graph.note(again)
        (host(to) if to.device.type == "npu" else to).copy_(host(source) if source.device.type == "npu" else source)
        return to

    aten.impl("copy_", copy_, "PrivateUse1", allow_override=True)
    own = {
        "aten": {
            "mm": native.mm, "bmm": native.mm, "matmul": native.matmul, "addmm": native.addmm,
            "sum.dim_IntList": native.sum, "_softmax": native.softmax, "_log_softmax": native.log_softmax,
        },
        "npu": {
            "npu_rms_norm": rms_norm, "npu_add_rms_norm": native.add_rms_norm, "npu_swiglu": swiglu,
            "npu_fused_infer_attention_score": native.attention, "npu_grouped_matmul": native.grouped_matmul,
            "npu_moe_token_unpermute": native.unpermute,
        },
        "_C_ascend": {"moe_gating_top_k": native.gate, "npu_moe_init_routing_custom": init_routing},
    }  # fmt: skip
    # vllm-ascend's C++ operators without which it runs no mixture of experts; they are not built here
    for schema in (
        "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, int norm_type, bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None) -> (Tensor y, Tensor expert_idx, Tensor out)",
        "npu_moe_init_routing_custom(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, int quant_mode=0, int[2] active_expert_range=[], int row_idx_type=0) -> (Tensor, Tensor, Tensor, Tensor)",
    ):
        library("_C_ascend", "FRAGMENT").define(schema)
    for schema in emulated_deepseek.SCHEMAS:
        library("_C_ascend", "FRAGMENT").define(schema)
    for namespace, operators in emulated_deepseek.operators(native).items():
        own[namespace].update(operators)
    for namespace, operators in own.items():
        for name, function in operators.items():
            library(namespace).impl(name, on_host(function, f"{namespace}::{name}"), "PrivateUse1", allow_override=True)
    atb = library("atb", "FRAGMENT")
    for schema, in_place in {
        "_npu_rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!) key, int head_size, Tensor cos_sin_cache, bool is_neox) -> ()": rotate,
        "_npu_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_indices) -> ()": reshape_and_cache,
        "_npu_matmul_add_fp32(Tensor x, Tensor weight, Tensor(a!) c) -> ()": matmul_add,
        "npu_paged_cache_load(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor context_lens, *, Tensor? seq_starts=None, bool cumsum=False, Tensor(a!)? key=None, Tensor(b!)? value=None) -> ()": paged_cache_load,
    }.items():
        atb.define(schema)
        name = schema.split("(")[0]
        atb.impl(name, on_host(in_place, f"atb::{name}"), "PrivateUse1")
    emulated_graph.install()
    _run_triton_on_this_memory()


def _run_triton_on_this_memory() -> None:
    """Triton's interpreter reads and writes the device's memory itself, not a packed copy of each view."""
    import interpreter
    from triton.runtime.interpreter import GridExecutor

    interpreter.install()
    down = lambda x: host(x) if isinstance(x, Tensor) and x.device.type == "npu" else x

    def on_device(self: Any, args: Any, kwargs: Any) -> Any:
        LAUNCHES[f"triton.{self.fn.__name__}"] += 1
        return [down(x) for x in args], {k: down(v) for k, v in kwargs.items()}

    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        if emulated_graph.capturing():  # the arguments' memory is that of the capture
            emulated_graph.note(lambda: run(self, *args, **kwargs))
        else:
            run(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    GridExecutor._init_args_hst = on_device
    GridExecutor._restore_args_dev = lambda self, *args: None


def before_vllm() -> None:
    """Stand-ins for what vllm-ascend imports and this machine lacks: pyACL, ATB, its C++ operators, torchvision's."""
    acl, rt = types.ModuleType("acl"), types.ModuleType("acl.rt")
    rt.memcpy, acl.rt = lambda *args: 0, rt  # type: ignore[attr-defined]
    built = {f"vllm_ascend.{name}": types.ModuleType(name) for name in ("vllm_ascend_C", "meta_registration")}
    sys.modules.update({"acl": acl, "acl.rt": rt, **built})
    import torch_npu.op_plugin.atb._atb_ops as atb_ops

    atb_ops._register_atb_extensions = lambda: None
    vision = library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # its extension is built for CUDA and does not load beside a torch for the CPU
        vision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _SlotMapping:
    """vllm-ascend's Triton kernel for slot numbers, written out."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(
            num_tokens: int, max_tokens: int, query_start_loc: Tensor, positions: Tensor, block_table: Tensor, stride: int,
            block_size: int, slot_mapping: Tensor, *, PAD_ID: int, **_: Any,
        ) -> None:  # fmt: skip
            ends, at, table = host(query_start_loc).tolist(), host(positions).long(), host(block_table).long()
            out = host(slot_mapping)
            for i in range(grid[0] - 1):
                p = at[ends[i] : ends[i + 1]]
                slots = table[i][p // block_size] * block_size + p % block_size
                out[ends[i] : ends[i + 1]] = slots.to(out.dtype)
            out[ends[grid[0] - 1] : max_tokens] = PAD_ID

        return run


def after_vllm() -> None:
    """ACL graphs are captured and replayed (`emulated_graph`)."""
    import vllm.model_executor.models.registry as registry
    import vllm.v1.worker.worker_base as worker_base
    import vllm_ascend.utils as utils

    registry._run_in_subprocess = lambda function: function()  # the subprocess would not have these stand-ins

    utils._CUSTOM_OP_ENABLED = False  # its C++ operators are not built here
    plain = worker_base.WorkerWrapperBase.init_device

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        import vllm_ascend.worker.block_table as block_table

        block_table._compute_slot_mapping_kernel = _SlotMapping()
        return plain(self, *args, **kwargs)

    worker_base.WorkerWrapperBase.init_device = init_device
